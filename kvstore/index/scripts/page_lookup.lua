-- KEYS     pages of a prefix, in order
-- ARGV     most holders to return of a page
-- Returns  a list of holders for each page, ending before the first page that nobody holds.
-- Closes   the race of a prefix read page by page while it changes.
-- Twice    it only reads.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local reply = {}
for index, page in ipairs(KEYS) do
  local holders = redis.call('ZRANGEBYSCORE', page, '(' .. now, '+inf', 'LIMIT', 0, ARGV[1])
  if #holders == 0 then
    break
  end
  reply[index] = holders
end
return reply
