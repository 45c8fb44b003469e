-- Index of the live workers of a service by load, and the choice of the worker for the next claim.
--
-- fleet:load sorts the live workers by taken worker slots, then by claims granted so far; workers without a free worker
-- slot are last. A claim therefore reads few workers. The index is derived from fleet:workers and fleet:slots and is
-- valid while fleet:indexed exists. It is rebuilt when a worker is added, changed or removed, when a coordinator with
-- worker slots is lost, and after INDEXED_MS, which repairs any damage.

local INDEXED_MS = 1000
local TAKEN_UNIT, FULL = 4294967296, 4503599627370496  -- 2^32 and 2^52: a score is exact below 2^53
local MOST_PAIRS = 500  -- pairs of one ZADD command

local function forget_index(place)
  redis.call('DEL', P .. 'indexed:' .. place)
end

-- Removes workers whose heartbeat has expired, and records them as lost unless they are shutting down.
local function note_silent(place)
  local key = P .. 'workers:' .. place
  local silent = redis.call('ZRANGEBYSCORE', key, '-inf', int(now), 'WITHSCORES')
  if #silent == 0 then
    return
  end
  forget_index(place)
  for i = 1, #silent, 2 do
    if redis.call('EXISTS', P .. 'leaving:' .. silent[i]) == 0 then
      note_loss(place, silent[i], tonumber(silent[i + 1]))
    end
    redis.call('HDEL', P .. 'live:' .. place, silent[i])
  end
  redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now))
end

-- Copies capacity, number of grants and numerics fingerprint of a worker to fleet:live, for scheduling. Returns the
-- copy; nil if the worker's key is missing.
local function copy_worker(place, id)
  local fields = redis.call('HMGET', P .. 'worker:' .. id, 'capacity', 'granted', 'info', 'numerics')
  if tonumber(fields[1]) and fields[3] then
    local copy = int(tonumber(fields[1])) .. '|' .. int(tonumber(fields[2]) or 0) .. '|' .. (fields[4] or '')
    redis.call('HSET', P .. 'live:' .. place, id, copy)
    return copy
  end
end

-- Returns the live workers. Runs three commands for any number of workers, and one more for each `hidden` worker. The
-- stored capacity of a hidden worker is 0, so that coordinators of the previous release do not call it.
local function live_workers(place)
  note_silent(place)
  local live, copies, fields = {}, {}, redis.call('HGETALL', P .. 'live:' .. place)
  for i = 1, #fields, 2 do
    copies[fields[i]] = fields[i + 1]
  end
  for _, id in ipairs(redis.call('ZRANGE', P .. 'workers:' .. place, 0, -1)) do
    local pattern = '^(%d+)|(%d+)|(.*)$'
    local capacity, granted, numerics = string.match(copies[id] or '', pattern)
    if not capacity then
      capacity, granted, numerics = string.match(copy_worker(place, id) or '', pattern)
    end
    if capacity then
      local hidden = capacity == '0'
      local actual = hidden and redis.call('HGET', P .. 'worker:' .. id, 'places') or capacity
      live[#live + 1] = { id = id, capacity = tonumber(actual) or 0, granted = tonumber(granted), numerics = numerics,
        hidden = hidden }
    end
    copies[id] = nil
  end
  for id in pairs(copies) do
    redis.call('HDEL', P .. 'live:' .. place, id)
    repaired('live')
  end
  return live
end

-- Returns whether a claim needs all worker slots of one worker, so that no other request can be lost with that worker.
-- The ticket contains this flag.
local function is_alone(ticket)
  return string.match(ticket, '/alone$') ~= nil
end

-- Returns whether a claim precedes other claims of its priority, because its request was handed over or its coordinator
-- refused the previous worker slot. The ticket contains this flag.
local function is_first(ticket)
  return string.match(ticket, '/first$') ~= nil or string.match(ticket, '/first/') ~= nil
end

-- Returns the numerics fingerprint that a claim's step checkpoint requires, from the ticket; nil if there is none.
local function equal_of(ticket)
  return string.match(ticket, '/equal:(%w+)')
end

-- Returns the taken worker slots: ticket, worker, owner, cost, time of the grant. Removes malformed entries.
local function read_slots(place)
  local found, slots = {}, redis.call('HGETALL', P .. 'slots:' .. place)
  for i = 1, #slots, 2 do
    local worker, owner, cost, since = string.match(slots[i + 1], '^(.-)|(.-)|(%d+)|(%d+)$')
    if worker then
      found[#found + 1] = { ticket = slots[i], worker = worker, owner = owner, cost = tonumber(cost),
        since = tonumber(since) }
    else
      redis.call('HDEL', P .. 'slots:' .. place, slots[i])
      repaired('slot')
    end
  end
  return found
end

-- Removes the worker slots of lost workers and lost coordinators. Returns the number of taken worker slots by worker,
-- the remaining worker slots, and the set of their owners. `workers` are the live workers; keys of other workers are
-- read one by one.
local function busy_slots(place, workers)
  local busy, held, owners, capacities, alive = {}, {}, {}, {}, {}
  for _, worker in ipairs(workers) do
    capacities[worker.id] = worker.capacity
  end
  for _, slot in ipairs(read_slots(place)) do
    local worker, owner = slot.worker, slot.owner
    if capacities[worker] == nil then
      capacities[worker] = tonumber(redis.call('HGET', P .. 'worker:' .. worker, 'capacity')) or false
    end
    if alive[owner] == nil then
      alive[owner] = redis.call('EXISTS', P .. 'coordinator:' .. owner) == 1
    end
    if capacities[worker] and alive[owner] then
      busy[worker] = (busy[worker] or 0) + (is_alone(slot.ticket) and capacities[worker] or 1)
      held[#held + 1], owners[owner] = slot, true
    else
      redis.call('HDEL', P .. 'slots:' .. place, slot.ticket)
      forget_index(place)
    end
  end
  return busy, held, owners
end

-- Returns the score of a worker in fleet:load.
local function load_score(taken, capacity, granted)
  return int((taken >= capacity and FULL or 0) + taken * TAKEN_UNIT + granted)
end

-- Rebuilds fleet:load. Returns the total capacity of the live workers, the set of owners of worker slots, and whether
-- there are hidden workers. Hidden workers are last in fleet:load and do not count in the capacity.
local function build_index(place)
  local workers = live_workers(place)
  local busy, _, owners = busy_slots(place, workers)
  local entries, capacity, names, hidden = {}, 0, {}, 0
  redis.call('DEL', P .. 'load:' .. place, P .. 'indexed:' .. place)
  for i, worker in ipairs(workers) do
    local shown = worker.hidden and 0 or worker.capacity
    capacity, hidden = capacity + shown, hidden + (worker.hidden and 1 or 0)
    entries[#entries + 1] = load_score(busy[worker.id] or 0, shown, worker.granted)
    entries[#entries + 1] = worker.id
    if #entries == 2 * MOST_PAIRS or i == #workers then
      redis.call('ZADD', P .. 'load:' .. place, unpack(entries))
      entries = {}
    end
  end
  for owner in pairs(owners) do
    names[#names + 1] = owner
  end
  redis.call('HSET', P .. 'indexed:' .. place, 'capacity', int(capacity), 'owners', table.concat(names, '\n'),
    'hidden', int(hidden))
  redis.call('PEXPIRE', P .. 'indexed:' .. place, INDEXED_MS)
  redis.call('PEXPIRE', P .. 'load:' .. place, int(CHURN_MS))
  return capacity, owners, hidden > 0
end

-- Makes fleet:load valid and returns the same as build_index(). An index of the previous release is rebuilt.
local function index(place)
  note_silent(place)
  local fields = redis.call('HMGET', P .. 'indexed:' .. place, 'capacity', 'owners', 'hidden')
  local owners, keys = {}, {}
  for owner in string.gmatch(fields[2] or '', '[^\n]+') do
    owners[owner] = true
    keys[#keys + 1] = P .. 'coordinator:' .. owner
  end
  if not tonumber(fields[1]) or not tonumber(fields[3])
    or (#keys > 0 and redis.call('EXISTS', unpack(keys)) < #keys) then
    return build_index(place)
  end
  return tonumber(fields[1]), owners, tonumber(fields[3]) > 0
end

-- Returns the id of the worker for the next claim: the first worker of fleet:load with a free worker slot that is
-- neither avoided now nor in the set `unfit`. If there is no such worker, returns nil, and whether the avoided or unfit
-- workers have free worker slots.
local function first_free(place, avoided, unfit)
  local start, found = 0, nil
  repeat
    found = redis.call('ZRANGEBYSCORE', P .. 'load:' .. place, '-inf', '(' .. int(FULL), 'LIMIT', start, 16)
    for _, id in ipairs(found) do
      if not unfit[id] and (not avoided[id] or avoided[id].till <= now) then
        return id
      end
    end
    start = start + #found
  until #found < 16
  return nil, start > 0
end

-- Updates the taken worker slots of a worker in fleet:load after a grant (sign 1) or a release (sign -1).
local function note_taken(place, id, ticket, sign)
  local score = tonumber(redis.call('ZSCORE', P .. 'load:' .. place, id))
  local capacity, granted = string.match(redis.call('HGET', P .. 'live:' .. place, id) or '', '^(%d+)|(%d+)|')
  if not score or not capacity then
    forget_index(place)
    return
  end
  local before = math.floor((score >= FULL and score - FULL or score) / TAKEN_UNIT)
  local taken = math.max(before + sign * (is_alone(ticket) and tonumber(capacity) or 1), 0)
  redis.call('ZADD', P .. 'load:' .. place, load_score(taken, tonumber(capacity), tonumber(granted)), id)
end

-- Records that a coordinator holds a worker slot, so that fleet:load is rebuilt when the coordinator is lost. `owners`
-- is the set of recorded coordinators.
local function note_owner(place, owner, owners)
  if not owners[owner] then
    owners[owner] = true
    local before = redis.call('HGET', P .. 'indexed:' .. place, 'owners') or ''
    redis.call('HSET', P .. 'indexed:' .. place, 'owners', before .. '\n' .. owner)
  end
end

