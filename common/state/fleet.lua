-- Every change of shared state that must happen as a whole. ARGV[1] names the operation, the rest are its arguments.
--
-- Messages are stored serialised and never opened here: a protobuf message followed by another of its type is their
-- merge, so a record grows by appending to `extra`. Time is this server's, in milliseconds, never a caller's.
--
--   fleet:request:<id>             hash   record, extra, state, created, updated, model, owner, epoch, cancel, key, token
--   fleet:events:<id>              stream field `event`
--   fleet:result:<id>:<file>:<n>   string a chunk of a file of the result
--   fleet:idempotency:<key>        string request id
--   fleet:requests, fleet:ended    zset   ids by sequence number; ended ids by the time their record expires
--   fleet:open:<model>             set    ids that have not ended
--   fleet:model:<model>            hash   fingerprint, contract:<service>
--   fleet:worker:<id>              hash   info, capacity, model, service, granted
--   fleet:workers:<model>/<svc>    zset   worker ids by the time their heartbeat runs out
--   fleet:queue:<model>/<svc>      zset   rank | ticket | owner, in lexical order
--   fleet:waiting:<model>/<svc>    hash   ticket -> its entry in the queue
--   fleet:slots:<model>/<svc>      hash   ticket -> worker | owner
--   fleet:coordinator:<owner>      string present while that coordinator's heartbeat lasts; also its channel
--   fleet:cancels:<owner>          set    ids that it should cancel

local P = 'fleet:'
local TERMINAL = 3
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local ops = {}

local function int(number)
  return string.format('%.0f', number)
end

local function is_open(id)
  local state = redis.call('HGET', P .. 'request:' .. id, 'state')
  return state and tonumber(state) < TERMINAL
end

local function snapshot(id)
  return redis.call('HMGET', P .. 'request:' .. id, 'record', 'extra', 'state', 'created', 'updated')
end

local function add_events(id, first)
  local ids = {}
  for i = first, #ARGV do
    ids[#ids + 1] = redis.call('XADD', P .. 'events:' .. id, '*', 'event', ARGV[i])
  end
  return ids
end

local function extend(id, extra)
  if extra ~= '' then
    local key = P .. 'request:' .. id
    redis.call('HSET', key, 'extra', (redis.call('HGET', key, 'extra') or '') .. extra)
  end
end

-- Drops ended requests whose records have expired from the index.
local function prune_index()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', int(now), 'LIMIT', 0, 100)) do
    redis.call('ZREM', P .. 'ended', id)
    redis.call('ZREM', P .. 'requests', id)
  end
end

-- id, owner, idempotency key, record, model, deadline or 0, most open requests, longest queue, n, n services, events
function ops.admit(id, owner, key, record, model, deadline, max_open, queue_limit, count)
  local known = key ~= '' and redis.call('GET', P .. 'idempotency:' .. key)
  if known and redis.call('EXISTS', P .. 'request:' .. known) == 1 then
    return { 'replayed', known, snapshot(known) }
  end
  if redis.call('EXISTS', P .. 'request:' .. id) == 1 then
    return { 'admitted', int(now), snapshot(id), {} }
  end
  if tonumber(deadline) > 0 and tonumber(deadline) <= now then
    return { 'late', int(now) }
  end
  local open = redis.call('SCARD', P .. 'open:' .. model)
  if open >= tonumber(max_open) then
    return { 'crowded', open }
  end
  for i = 1, tonumber(count) do
    local service = ARGV[10 + i]
    local length = redis.call('ZCARD', P .. 'queue:' .. model .. '/' .. service)
    if length >= tonumber(queue_limit) then
      return { 'full', service, length }
    end
  end
  redis.call('HSET', P .. 'request:' .. id, 'record', record, 'extra', '', 'state', '1', 'created', int(now),
    'updated', int(now), 'model', model, 'owner', owner, 'epoch', '1', 'key', key)
  redis.call('ZADD', P .. 'requests', redis.call('INCR', P .. 'sequence'), id)
  redis.call('SADD', P .. 'open:' .. model, id)
  if key ~= '' then
    redis.call('SET', P .. 'idempotency:' .. key, id)
  end
  local events = add_events(id, 11 + tonumber(count))
  prune_index()
  return { 'admitted', int(now), snapshot(id), events }
end

-- id, new state or '', addition to the record, events. Refused once the request has ended.
function ops.append(id, state, extra)
  if not is_open(id) then
    return { 'ended' }
  end
  if state ~= '' then
    redis.call('HSET', P .. 'request:' .. id, 'state', state, 'updated', int(now))
  end
  extend(id, extra)
  return { 'appended', add_events(id, 5) }
end

local function finish(id, token, state, extra, keep)
  local key = P .. 'request:' .. id
  redis.call('HSET', key, 'state', state, 'updated', int(now), 'token', token)
  extend(id, extra)
  local fields = redis.call('HMGET', key, 'model', 'key')
  redis.call('SREM', P .. 'open:' .. fields[1], id)
  redis.call('ZADD', P .. 'ended', int(now + tonumber(keep)), id)
  redis.call('PEXPIRE', key, keep)
  if fields[2] ~= '' then
    redis.call('PEXPIRE', P .. 'idempotency:' .. fields[2], keep)
  end
end

-- id, token, state, addition to the record, ms to keep it, events. The first one wins; its own repetition is no loss.
function ops.finish(id, token, state, extra, keep)
  if not is_open(id) then
    local mine = redis.call('HGET', P .. 'request:' .. id, 'token') == token
    return { mine and 'finished' or 'ended', {} }
  end
  finish(id, token, state, extra, keep)
  local events = add_events(id, 7)
  redis.call('PEXPIRE', P .. 'events:' .. id, keep)
  prune_index()
  return { 'finished', events }
end

-- id, state, ms to keep the record, event. Tells the owner; where that one is dead, the request ends here.
function ops.cancel(id, state, keep)
  local key = P .. 'request:' .. id
  if is_open(id) then
    local owner = redis.call('HGET', key, 'owner')
    redis.call('HSET', key, 'cancel', '1')
    if redis.call('EXISTS', P .. 'coordinator:' .. owner) == 1 then
      redis.call('SADD', P .. 'cancels:' .. owner, id)
      redis.call('PEXPIRE', P .. 'cancels:' .. owner, 60000)
      redis.call('PUBLISH', P .. 'coordinator:' .. owner, 'cancel\n' .. id)
    else
      finish(id, 'cancel', state, '', keep)
      add_events(id, 5)
      redis.call('PEXPIRE', P .. 'events:' .. id, keep)
    end
  end
  return snapshot(id)
end

-- Ids of open requests of a model whose coordinator is dead.
function ops.orphans(model)
  local orphans = {}
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'open:' .. model)) do
    local owner = redis.call('HGET', P .. 'request:' .. id, 'owner')
    if owner and redis.call('EXISTS', P .. 'coordinator:' .. owner) == 0 then
      orphans[#orphans + 1] = id
    end
  end
  return orphans
end

-- owner, ms that the beat lasts. Returns the ids to cancel since the last beat.
function ops.beat(owner, lasts)
  redis.call('SET', P .. 'coordinator:' .. owner, '1', 'PX', lasts)
  local ids = redis.call('SMEMBERS', P .. 'cancels:' .. owner)
  redis.call('DEL', P .. 'cancels:' .. owner)
  return ids
end

function ops.resign(owner)
  redis.call('DEL', P .. 'coordinator:' .. owner, P .. 'cancels:' .. owner)
end

-- model, fingerprint, ms that it lasts, pairs of service and contract. The first one to declare a model decides.
function ops.declare(model, fingerprint, lasts)
  local key = P .. 'model:' .. model
  local known = redis.call('HGET', key, 'fingerprint')
  if known and known ~= fingerprint then
    return { 'fingerprint', known }
  end
  for i = 5, #ARGV, 2 do
    local contract = redis.call('HGET', key, 'contract:' .. ARGV[i])
    if contract and contract ~= ARGV[i + 1] then
      return { 'contract', contract }
    end
  end
  redis.call('HSET', key, 'fingerprint', fingerprint)
  for i = 5, #ARGV, 2 do
    redis.call('HSET', key, 'contract:' .. ARGV[i], ARGV[i + 1])
  end
  redis.call('PEXPIRE', key, lasts)
  return { 'declared' }
end

local function split(text)
  local first, rest = string.match(text, '^(.-)|(.*)$')
  return first, rest
end

-- Drops the slots of dead workers and dead coordinators; returns how many each worker has.
local function busy_slots(place)
  local busy, slots = {}, redis.call('HGETALL', P .. 'slots:' .. place)
  for i = 1, #slots, 2 do
    local worker, owner = split(slots[i + 1])
    if redis.call('EXISTS', P .. 'worker:' .. worker) == 0
      or redis.call('EXISTS', P .. 'coordinator:' .. owner) == 0 then
      redis.call('HDEL', P .. 'slots:' .. place, slots[i])
    else
      busy[worker] = (busy[worker] or 0) + 1
    end
  end
  return busy
end

local function live_workers(place)
  redis.call('ZREMRANGEBYSCORE', P .. 'workers:' .. place, '-inf', int(now))
  local live = {}
  for _, id in ipairs(redis.call('ZRANGE', P .. 'workers:' .. place, 0, -1)) do
    local fields = redis.call('HMGET', P .. 'worker:' .. id, 'capacity', 'granted', 'info')
    if fields[1] then
      live[#live + 1] = { id = id, capacity = tonumber(fields[1]), granted = tonumber(fields[2]), info = fields[3] }
    end
  end
  return live
end

-- The live worker with a free slot that has the fewest taken; among equals the one that got the fewest so far.
local function least_busy(workers, busy)
  local best
  for _, worker in ipairs(workers) do
    local taken = busy[worker.id] or 0
    if taken < worker.capacity then
      local before = best and (busy[best.id] or 0)
      if not best or taken < before or (taken == before and worker.granted < best.granted) then
        best = worker
      end
    end
  end
  return best
end

local function leave_queue(place, ticket)
  local entry = redis.call('HGET', P .. 'waiting:' .. place, ticket)
  if entry then
    redis.call('HDEL', P .. 'waiting:' .. place, ticket)
    redis.call('ZREM', P .. 'queue:' .. place, entry)
  end
end

-- Hands free slots to those who wait, in order. Coordinators hear of theirs on their channels. Returns the live workers.
local function dispatch(place, asking)
  local workers = live_workers(place)
  local busy = busy_slots(place)
  while true do
    local entry = redis.call('ZRANGE', P .. 'queue:' .. place, 0, 0)[1]
    if not entry then
      break
    end
    local _, rest = split(entry)
    local ticket, owner = split(rest)
    if redis.call('EXISTS', P .. 'coordinator:' .. owner) == 1 then
      local worker = least_busy(workers, busy)
      if not worker then
        break
      end
      busy[worker.id] = (busy[worker.id] or 0) + 1
      worker.granted = redis.call('HINCRBY', P .. 'worker:' .. worker.id, 'granted', 1)
      redis.call('HSET', P .. 'slots:' .. place, ticket, worker.id .. '|' .. owner)
      if ticket ~= asking then
        redis.call('PUBLISH', P .. 'coordinator:' .. owner, 'grant\n' .. ticket .. '\n' .. worker.info)
      end
    end
    leave_queue(place, ticket)
  end
  return workers
end

-- ticket, model/service, owner, priority, deadline or 0. Asking again with the same ticket changes nothing.
function ops.claim(ticket, place, owner, priority, deadline)
  if redis.call('HEXISTS', P .. 'slots:' .. place, ticket) == 0
    and redis.call('HEXISTS', P .. 'waiting:' .. place, ticket) == 0 then
    local latest = tonumber(deadline) > 0 and math.min(tonumber(deadline), 9999999999999) or 9999999999999
    local rank = string.format('%03d%013.0f%016.0f', 100 - tonumber(priority), latest, redis.call('INCR', P .. 'sequence'))
    local entry = rank .. '|' .. ticket .. '|' .. owner
    redis.call('ZADD', P .. 'queue:' .. place, 0, entry)
    redis.call('HSET', P .. 'waiting:' .. place, ticket, entry)
  end
  local workers = dispatch(place, ticket)
  local slot = redis.call('HGET', P .. 'slots:' .. place, ticket)
  if slot then
    return { 'granted', redis.call('HGET', P .. 'worker:' .. split(slot), 'info') }
  end
  return { 'waiting', #workers }
end

-- ticket, model/service. Gives back a slot, or a place in the queue.
function ops.release(ticket, place)
  redis.call('HDEL', P .. 'slots:' .. place, ticket)
  leave_queue(place, ticket)
  dispatch(place)
end

-- worker, model, service, capacity, info, ms that the beat lasts
function ops.announce(worker, model, service, capacity, info, lasts)
  local place = model .. '/' .. service
  redis.call('HSET', P .. 'worker:' .. worker, 'model', model, 'service', service, 'capacity', capacity, 'info', info)
  redis.call('HSETNX', P .. 'worker:' .. worker, 'granted', '0')
  redis.call('PEXPIRE', P .. 'worker:' .. worker, lasts)
  redis.call('ZADD', P .. 'workers:' .. place, int(now + tonumber(lasts)), worker)
  redis.call('PEXPIRE', P .. 'workers:' .. place, lasts)
  dispatch(place)
end

function ops.withdraw(worker)
  local fields = redis.call('HMGET', P .. 'worker:' .. worker, 'model', 'service')
  if fields[1] then
    redis.call('ZREM', P .. 'workers:' .. fields[1] .. '/' .. fields[2], worker)
    redis.call('DEL', P .. 'worker:' .. worker)
  end
end

-- model/service. Live workers' infos, slots taken, length of the queue.
function ops.status(place)
  local infos = {}
  for i, worker in ipairs(live_workers(place)) do
    infos[i] = worker.info
  end
  local taken = 0
  for _, count in pairs(busy_slots(place)) do
    taken = taken + count
  end
  return { infos, taken, redis.call('ZCARD', P .. 'queue:' .. place) }
end

return ops[ARGV[1]](unpack(ARGV, 2))
