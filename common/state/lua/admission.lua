-- Estimates the work of a service from the pace of its latest requests. Returns these fields:
-- `pace`: ms per unit of cost; nil before the first measurement.
-- `queued`: ms until all open work is done. `own`: ms of the caller's share of `queued`.
-- `more`: ms that a request of this variant and cost adds.
-- `callers`: number of callers with open work, including this caller. `capacity`: number of concurrent requests, on
-- workers that fit the wiring of the request at this service.
local function forecast(place, variant, caller, cost, wiring)
  local capacity = index(place)
  if wiring then
    capacity = fit_of(place, wiring).capacity
  end
  local found = { capacity = math.max(capacity, 1), callers = 1, queued = 0, own = 0, more = 0 }
  found.pace = pace_of(place, variant)
  if not found.pace then
    return found
  end
  local paces, others = { [variant] = found.pace }, {}
  local function pace(each)
    paces[each] = paces[each] or pace_of(place, each) or found.pace
    return paces[each]
  end
  local open, has_variants = redis.call('HGETALL', P .. 'work:' .. place), variant ~= ''
  for i = 1, #open, 2 do
    local name, of = string.match(open[i], '^([^|]*)|?(.*)$')
    has_variants = has_variants or of ~= ''
    local ms = (tonumber(open[i + 1]) or 0) * pace(of) / found.capacity
    found.queued = found.queued + ms
    if name == caller then
      found.own = found.own + ms
    elseif not others[name] then
      others[name] = true
      found.callers = found.callers + 1
    end
  end
  for _, slot in ipairs(read_slots(place)) do
    local ms = slot.cost * pace(has_variants and variant_of(slot.ticket) or '')
    found.queued = found.queued - math.min(now - slot.since, ms) / found.capacity
  end
  found.more = cost * found.pace / found.capacity
  return found
end

-- Returns the refusal of a request or nil, then the ms that the slowest service needs for this request alone. A request
-- is refused when the open work exceeds `max_work`, or, while a service has no measured pace, when the number of open
-- requests reaches its capacity. A caller whose open work is at most an equal share of `max_work` is not refused
-- because of other callers' work.
local function overload(model, variant, caller, costs, open, max_work, wirings)
  local most, more, unmeasured = 0, 0, false
  for i = 1, #costs, 2 do
    local place, text = model .. '/' .. costs[i], wirings[costs[i]]
    local digest = text and string.sub(server.sha1hex(text), 1, 16)
    store_wiring(place, digest, text or '')
    local service = forecast(place, variant, caller, tonumber(costs[i + 1]), digest)
    more = math.max(more, service.more)
    unmeasured = unmeasured or not service.pace and open >= service.capacity
    if service.queued > max_work and service.own > max_work / service.callers then
      most = math.max(most, service.queued)
    end
  end
  if max_work > 0 and most > 0 then
    return { 'busy', int(most), int(most - max_work) }, int(more)
  end
  if max_work > 0 and unmeasured then
    return { 'unmeasured', open, int(max_work) }, int(more)
  end
  return nil, int(more)
end

-- Removes ended requests from the index once their records have expired.
local function prune_index()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', int(now), 'LIMIT', 0, 100)) do
    redis.call('ZREM', P .. 'ended', id)
    redis.call('ZREM', P .. 'requests', id)
  end
end

-- Stores a request, unless its idempotency key or its id is known. Refusals except `late` and `memory` contain the
-- retry delay in ms. A full store still returns requests that it has admitted before.
takes.admit = {
  'id', 'model', 'caller', 'owner',
  'variant',               -- or ''
  'record', 'submission',  -- serialized
  'idempotency_key',       -- or ''
  'deadline',              -- ms since 1970, 0 for none
  'max_open',              -- maximum number of open requests of the model
  'max_open_of_caller',    -- maximum number of open requests of the caller
  'max_queued',            -- maximum number of waiting claims of one service
  'max_work',              -- maximum open work of one service in ms, 0 for no limit
  'is_full',               -- 1 if the store is full, else 0
  'costs*',                -- pairs of service and cost
  'work*',                 -- pairs of service and steps|tokens of a step|shape
  'wirings*',              -- pairs of service and the wiring of the request's claims there
  'events*',               -- serialized
}
function ops.admit(a)
  local id, model, caller, costs, key = a.id, a.model, a.caller, a.costs, a.idempotency_key
  local deadline, max_work = tonumber(a.deadline), tonumber(a.max_work)
  local known = key ~= '' and redis.call('GET', P .. 'idempotency:' .. key)
  if known and redis.call('EXISTS', P .. 'request:' .. known) == 1 then
    return { 'replayed', known, snapshot(known) }
  end
  if redis.call('EXISTS', P .. 'request:' .. id) == 1 then
    return { 'admitted', int(now), snapshot(id), {} }
  end
  if deadline > 0 and deadline <= now then
    return { 'late', int(now) }
  end
  if a.is_full == '1' then
    return { 'memory' }
  end
  local open = redis.call('SCARD', P .. 'open:' .. model)
  local wirings = {}
  for i = 1, #a.wirings, 2 do
    wirings[a.wirings[i]] = a.wirings[i + 1]
  end
  local busy, alone = overload(model, a.variant, caller, costs, open, max_work, wirings)
  if open >= tonumber(a.max_open) then
    return { 'crowded', open, alone }
  end
  local theirs = redis.call('SCARD', P .. 'open-by:' .. caller)
  if caller ~= '' and theirs >= tonumber(a.max_open_of_caller) then
    return { 'quota', theirs, alone }
  end
  for i = 1, #costs, 2 do
    local length = redis.call('ZCARD', P .. 'queue:' .. model .. '/' .. costs[i])
    if length >= tonumber(a.max_queued) then
      return { 'full', length, alone, costs[i] }
    end
  end
  if busy then
    return busy
  end
  redis.call('HSET', P .. 'request:' .. id, 'record', a.record, 'extra', '', 'state', '1', 'created', int(now),
    'updated', int(now), 'model', model, 'owner', a.owner, 'epoch', '1', 'key', key, 'caller', caller,
    'variant', a.variant, 'submission', a.submission)
  for i = 1, #costs, 2 do
    redis.call('HSET', P .. 'request:' .. id, 'left:' .. costs[i], costs[i + 1])
    redis.call('HINCRBY', P .. 'work:' .. model .. '/' .. costs[i], work_field(caller, a.variant), costs[i + 1])
  end
  for i = 1, #a.work, 2 do
    redis.call('HSET', P .. 'request:' .. id, 'work:' .. a.work[i], a.work[i + 1])
  end
  redis.call('ZADD', P .. 'requests', int(next_number()), id)
  redis.call('SADD', P .. 'open:' .. model, id)
  if caller ~= '' then
    redis.call('SADD', P .. 'open-by:' .. caller, id)
  end
  if key ~= '' then
    redis.call('SET', P .. 'idempotency:' .. key, id)
  end
  local events = add_events(id, a.events)
  prune_index()
  return { 'admitted', int(now), snapshot(id), events }
end
