-- Which workers of a service are live, how many of their slots are taken, and which of them gets the next claim.
--
-- fleet:load has the live workers in the order in which they get claims, so that a claim reads few of them: by slots taken,
-- then by claims granted so far; those without a free slot come last. It is a copy of what fleet:workers and fleet:slots
-- say, and is valid while fleet:indexed exists. It is rebuilt when a worker or a coordinator comes or goes, and after
-- INDEXED_MS, which repairs any damage.

local INDEXED_MS = 1000
local TAKEN_UNIT, FULL = 4294967296, 4503599627370496  -- 2^32 and 2^52: a score is exact below 2^53
local MOST_PAIRS = 500  -- of one ZADD

local function forget_index(place)
  redis.call('DEL', P .. 'indexed:' .. place)
end

-- Takes workers whose heartbeat has run out off the list, and notes them as lost unless they left.
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

-- Copies what decides where claims go from a worker's own key. Returns the copy, nil for a worker without that key.
local function copy_worker(place, id)
  local fields = redis.call('HMGET', P .. 'worker:' .. id, 'capacity', 'granted', 'info', 'numerics')
  if tonumber(fields[1]) and fields[3] then
    local copy = int(tonumber(fields[1])) .. '|' .. int(tonumber(fields[2]) or 0) .. '|' .. (fields[4] or '')
    redis.call('HSET', P .. 'live:' .. place, id, copy)
    return copy
  end
end

-- The live workers, with three commands however many there are, and one more for each that is `hidden`: the last release
-- reads a capacity of 0.
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
      local places = hidden and redis.call('HGET', P .. 'worker:' .. id, 'places') or capacity
      live[#live + 1] = { id = id, capacity = tonumber(places) or 0, granted = tonumber(granted), numerics = numerics,
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

-- Whether a claim is for all slots of one worker, which its ticket says: no other request may be lost with this one.
local function is_alone(ticket)
  return string.match(ticket, '/alone$') ~= nil
end

-- Whether a claim is for a request that was handed over, which its ticket says: it goes first of its priority.
local function is_first(ticket)
  return string.match(ticket, '/first$') ~= nil or string.match(ticket, '/first/') ~= nil
end

-- The numerics fingerprint that the checkpoint of a claim's request needs, which its ticket says; nil for any.
local function equal_of(ticket)
  return string.match(ticket, '/equal:(%w+)')
end

-- The slots that are held, as they were written: ticket, worker, owner, cost, since. Others are removed.
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

-- Drops the slots of dead workers and dead coordinators; returns how many each worker has, all that are left, and the set
-- of their owners. `workers` are the live ones: only others are looked up.
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

-- The place of a worker in fleet:load.
local function load_score(taken, capacity, granted)
  return int((taken >= capacity and FULL or 0) + taken * TAKEN_UNIT + granted)
end

-- Rebuilds fleet:load. Returns the capacity of all live workers together, the set of owners of slots, and whether there
-- are hidden workers: their capacity is left out, and they are last in fleet:load.
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

-- Returns what build_index does. fleet:load is true afterwards. An index that the last release has built is rebuilt.
local function index(place)
  note_silent(place)
  local fields = redis.call('HMGET', P .. 'indexed:' .. place, 'capacity', 'owners', 'hidden')
  local owners, keys = {}, {}
  for owner in string.gmatch(fields[2] or '', '[^\n]+') do
    owners[owner] = true
    keys[#keys + 1] = P .. 'coordinator:' .. owner
  end
  if not tonumber(fields[1]) or not tonumber(fields[3]) or (#keys > 0 and redis.call('EXISTS', unpack(keys)) < #keys) then
    return build_index(place)
  end
  return tonumber(fields[1]), owners, tonumber(fields[3]) > 0
end

-- The worker that gets the next claim: the first one of fleet:load with a free slot that is not avoided by now, nor in the
-- set `unfit`. nil where there is none, and whether that is since all that are free are one of both.
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

-- Adds a slot that a ticket has been given (1) or has given back (-1) to what its worker has taken in fleet:load.
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

-- Records that a coordinator holds a slot, so that fleet:load is rebuilt when the coordinator ends. `owners` is the set
-- of those that hold one.
local function note_owner(place, owner, owners)
  if not owners[owner] then
    owners[owner] = true
    local before = redis.call('HGET', P .. 'indexed:' .. place, 'owners') or ''
    redis.call('HSET', P .. 'indexed:' .. place, 'owners', before .. '\n' .. owner)
  end
end

