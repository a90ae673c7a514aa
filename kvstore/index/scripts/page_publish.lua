-- KEYS     pages
-- ARGV     boot id of the holder, time to live in ms
-- Returns  1
-- Closes   the race of two holders of one page: the page lives as long as the longer of them.
-- Twice    moves the holder's deadline to the later call, as a renewal does.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl = tonumber(ARGV[2])

for _, page in ipairs(KEYS) do
  -- Adding comes first: a full server refuses it only while the script has written nothing.
  redis.call('ZADD', page, now + ttl, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', page, '-inf', now)
  if redis.call('PTTL', page) < ttl then
    redis.call('PEXPIRE', page, ARGV[2])
  end
end
return 1
