-- KEYS[1]  the request's handover: attempt, state, prefill, decode, num_pages, deadline in ms
-- ARGV     attempt, prefill boot id, decode boot id, number of pages, remaining ms, time to live in ms
-- Returns  1, or 0 if a newer attempt, or another offer of this one, came before.
-- Closes   the race of an old attempt's delayed offer with the attempt that replaced it.
-- Twice    finds its own offer and leaves it alone, in whatever state it is by then.
local attempt = tonumber(ARGV[1])
local held = redis.call('HMGET', KEYS[1], 'attempt', 'prefill', 'decode', 'num_pages')
local held_attempt = tonumber(held[1])

if held_attempt and held_attempt > attempt then
  return 0
end
if held_attempt == attempt then
  local same = held[2] == ARGV[2] and held[3] == ARGV[3] and held[4] == ARGV[4]
  return same and 1 or 0
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local deadline = string.format('%.0f', now + tonumber(ARGV[5]))
redis.call('HSET', KEYS[1], 'attempt', ARGV[1], 'state', 'offered', 'prefill', ARGV[2],
  'decode', ARGV[3], 'num_pages', ARGV[4], 'deadline', deadline)
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return 1
