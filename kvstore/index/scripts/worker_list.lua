-- KEYS[1]  the workers' hash
-- ARGV     largest value to return, in bytes
-- Returns  number of malformed values, then boot id, endpoint, record of each live worker, flat.
-- Closes   the race of a reader that drops a dead worker with that worker's next heartbeat.
-- Twice    finds nothing more to drop. A value it does not understand may be a newer version's,
--          so it is left alone.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local max_bytes = tonumber(ARGV[1])

local reply = {0}
for _, boot_id in ipairs(redis.call('HKEYS', KEYS[1])) do
  local deadline, endpoint, record
  if redis.call('HSTRLEN', KEYS[1], boot_id) <= max_bytes then
    local value = redis.call('HGET', KEYS[1], boot_id)
    deadline, endpoint, record = string.match(value, '^(%d+) (%S+) (.+)$')
  end
  if not deadline then
    reply[1] = reply[1] + 1
  elseif tonumber(deadline) <= now then
    redis.call('HDEL', KEYS[1], boot_id)
  else
    reply[#reply + 1] = boot_id
    reply[#reply + 1] = endpoint
    reply[#reply + 1] = record
  end
end
return reply
