-- KEYS[1]  the request's handover
-- ARGV     attempt, new state
-- Returns  1, or 0 if this attempt is not the present one or ended in another state.
-- Closes   the race of two ends of one attempt: the first to arrive is the one that counts.
-- Twice    finds the state it would set and leaves it.
local held = redis.call('HMGET', KEYS[1], 'attempt', 'state')
if held[1] ~= ARGV[1] then
  return 0
end
if held[2] == 'offered' then
  redis.call('HSET', KEYS[1], 'state', ARGV[2])
  return 1
end
return held[2] == ARGV[2] and 1 or 0
