-- KEYS[1]  the request's handover
-- ARGV     largest field to return, in bytes
-- Returns  attempt, state, prefill, decode, num_pages, remaining ms; or an empty list for none.
-- Closes   the race of a deadline read now with a clock read later.
-- Twice    it only reads.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {}
end
local reply = {}
for index, name in ipairs({'attempt', 'state', 'prefill', 'decode', 'num_pages', 'deadline'}) do
  if redis.call('HSTRLEN', KEYS[1], name) > tonumber(ARGV[1]) then
    return redis.error_reply('ERR handover field ' .. name .. ' is too long')
  end
  reply[index] = redis.call('HGET', KEYS[1], name) or ''
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if string.match(reply[6], '^%d+$') then
  reply[6] = string.format('%.0f', math.max(0, tonumber(reply[6]) - now))
end
return reply
