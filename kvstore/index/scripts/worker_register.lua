-- KEYS[1]  the workers' hash
-- ARGV     boot id, endpoint, record, time to live in ms
-- Returns  1, or 0 if the identity is alive under another endpoint.
-- Closes   the race of two workers that claim one identity: only one finds the place free; and that
--          of a restarted worker with the time to live of the one that died: a port has one listener,
--          so a new identity takes the place of whoever was registered at its endpoint.
-- Twice    writes the same record with a later deadline, as any heartbeat does.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl = tonumber(ARGV[4])

local held = redis.call('HGET', KEYS[1], ARGV[1]) or ''
local deadline, endpoint = string.match(held, '^(%d+) (%S+) ')
if deadline and tonumber(deadline) > now then
  if endpoint ~= ARGV[2] then
    return 0
  end
else
  for _, boot_id in ipairs(redis.call('HKEYS', KEYS[1])) do
    local other = redis.call('HGET', KEYS[1], boot_id)
    if string.match(other, '^%d+ (%S+) ') == ARGV[2] then
      redis.call('HDEL', KEYS[1], boot_id)
    end
  end
end

local value = string.format('%.0f %s %s', now + ttl, ARGV[2], ARGV[3])
redis.call('HSET', KEYS[1], ARGV[1], value)
if redis.call('PTTL', KEYS[1]) < ttl then
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return 1
