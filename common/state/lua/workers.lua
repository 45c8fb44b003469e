-- Declares the checkpoint fingerprint of a model for `lasts` ms. The first declaration is binding until it expires.
takes.declare = { 'model', 'fingerprint', 'lasts' }
function ops.declare(a)
  local key = P .. 'model:' .. a.model
  local known = redis.call('HGET', key, 'fingerprint')
  if known and known ~= a.fingerprint then
    return { 'fingerprint', known }
  end
  redis.call('HSET', key, 'fingerprint', a.fingerprint)
  move_older(a.model, a.lasts)
  redis.call('PEXPIRE', key, a.lasts)
  return { 'declared' }
end

-- Returns the refusals of a model's workers within REFUSED_MS, the latest first: service, fingerprint, time, worker and
-- reason. Removes older entries and entries beyond MOST_REFUSED.
local function refusals(model)
  local key, found = P .. 'refused:' .. model, {}
  local fields = redis.call('HGETALL', key)
  for i = 1, #fields, 2 do
    local service, fingerprint = string.match(fields[i], '^(.-)|(.*)$')
    local at, worker, reason = string.match(fields[i + 1], '^(%d+)|(.-)|(.*)$')
    if service and at and tonumber(at) > now - REFUSED_MS then
      found[#found + 1] = { service, fingerprint, at, worker, reason, fields[i] }
    else
      redis.call('HDEL', key, fields[i])
    end
  end
  table.sort(found, function(one, other)
    return tonumber(one[3]) > tonumber(other[3])
  end)
  while #found > MOST_REFUSED do
    redis.call('HDEL', key, table.remove(found)[6])
  end
  return found
end

-- Records that a worker was refused. Refusals with equal service and fingerprint, such as those of a restarting pod,
-- share an entry.
takes.refuse = { 'model', 'service', 'fingerprint', 'worker', 'reason' }
function ops.refuse(a)
  local key = P .. 'refused:' .. a.model
  redis.call('HSET', key, a.service .. '|' .. a.fingerprint, int(now) .. '|' .. a.worker .. '|' .. a.reason)
  redis.call('PEXPIRE', key, int(REFUSED_MS))
  refusals(a.model)
end

-- Returns the latest refusals of a model's workers.
takes.refusals = { 'model' }
function ops.refusals(a)
  return refusals(a.model)
end

-- Stores the heartbeat of a worker, unless the worker is shutting down. Coordinators of the previous release assume
-- that all workers have the same contract; for a worker with another contract, they read capacity 0.
takes.announce = {
  'worker', 'model', 'service',
  'capacity',  -- number of concurrent requests
  'info',      -- WorkerInfo, serialized
  'lasts',     -- heartbeat TTL in ms
  'numerics',  -- numerics fingerprint
  'contract',  -- see contracts.lua, or ''
  'older',     -- the contract in the format of the previous release
}
function ops.announce(a)
  local worker, lasts = a.worker, a.lasts
  if redis.call('EXISTS', P .. 'leaving:' .. worker) == 1 then
    return
  end
  local place = a.model .. '/' .. a.service
  local was_live = redis.call('EXISTS', P .. 'worker:' .. worker) == 1
  local before = was_live and redis.call('HGET', P .. 'live:' .. place, worker)
  if was_live then
    redis.call('ZREM', P .. 'lost:' .. place, worker)
  end
  local older = older_contract(place)
  local capacity = older and older ~= a.older and '0' or a.capacity
  redis.call('HSET', P .. 'worker:' .. worker, 'model', a.model, 'service', a.service, 'capacity', capacity,
    'places', a.capacity, 'info', a.info, 'lasts', lasts, 'numerics', a.numerics, 'contract', a.contract)
  redis.call('HSETNX', P .. 'worker:' .. worker, 'granted', '0')
  redis.call('PEXPIRE', P .. 'worker:' .. worker, lasts)
  redis.call('ZADD', P .. 'workers:' .. place, int(now + tonumber(lasts)), worker)
  redis.call('PEXPIRE', P .. 'workers:' .. place, int(tonumber(lasts) + CHURN_MS))
  local after = copy_worker(place, worker)
  redis.call('PEXPIRE', P .. 'live:' .. place, int(tonumber(lasts) + CHURN_MS))
  clear(worker)
  if before ~= after then
    forget_index(place)
    dispatch(place)
  end
end

-- Records that a worker shuts down: it gets no new requests, and calls that are lost with it in the next `lasts` ms do
-- not count against their requests.
takes.leaving = { 'worker', 'lasts' }
function ops.leaving(a)
  local worker = a.worker
  redis.call('SET', P .. 'leaving:' .. worker, '1', 'PX', a.lasts)
  local fields = redis.call('HMGET', P .. 'worker:' .. worker, 'model', 'service')
  if fields[1] and fields[2] then
    local place = fields[1] .. '/' .. fields[2]
    redis.call('ZREM', P .. 'workers:' .. place, worker)
    redis.call('HDEL', P .. 'live:' .. place, worker)
    forget_index(place)
    redis.call('ZREM', P .. 'lost:' .. place, worker)
  end
  redis.call('DEL', P .. 'worker:' .. worker)
  clear(worker)
end

-- Returns the infos of the live workers that fit at least one wiring, the number of taken worker slots of these
-- workers, the number of waiting claims, the number of workers lost within CHURN_MS, and the faults: worker, index of
-- the wiring, reason.
takes.status = {
  'place',     -- model/service
  'wirings*',  -- empty to count all workers
}
function ops.status(a)
  local place = a.place
  local infos, taken, faults, misfits, workers = {}, 0, {}, {}, live_workers(place)
  for number, wiring in ipairs(a.wirings) do
    local found = faults_of(place, workers, wiring)
    for _, worker in ipairs(workers) do
      if found[worker.id] then
        misfits[worker.id] = (misfits[worker.id] or 0) + 1
        faults[#faults + 1] = { worker.id, number, found[worker.id] }
      end
    end
  end
  local busy = busy_slots(place, workers)
  for _, worker in ipairs(workers) do
    if #a.wirings == 0 or misfits[worker.id] ~= #a.wirings then
      infos[#infos + 1] = redis.call('HGET', P .. 'worker:' .. worker.id, 'info') or nil
      taken = taken + (busy[worker.id] or 0)
    end
  end
  local dead = redis.call('ZCOUNT', P .. 'lost:' .. place, int(now - CHURN_MS), '+inf')
  return { infos, taken, redis.call('ZCARD', P .. 'queue:' .. place), dead, faults }
end
