-- Claims and releases of worker slots. The choice of the worker for a claim is made here, in dispatch().

-- Returns the workers that a coordinator avoids: the end of each pause (ms since 1970) and its length in ms.
local function avoided_by(owner)
  local found, fields = {}, redis.call('HGETALL', P .. 'avoided:' .. owner)
  for i = 1, #fields, 2 do
    local till, pause = string.match(fields[i + 1], '^(%d+)|(%d+)$')
    if till then
      found[fields[i]] = { till = tonumber(till), pause = tonumber(pause) }
    end
  end
  return found
end

-- Returns the worker with the fewest taken worker slots; of equal workers, the worker with the fewest grants. Considers
-- only workers with fewer than `most` (default: capacity) taken worker slots that are neither in the set `reserved` nor
-- avoided now.
local function least_busy(workers, busy, reserved, avoided, most)
  local best
  for _, worker in ipairs(workers) do
    local taken = busy[worker.id] or 0
    local until_then = avoided[worker.id] and avoided[worker.id].till or 0
    if taken < (most or worker.capacity) and not reserved[worker.id] and until_then <= now then
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

-- Returns whether a live coordinator waits for a claim: the claim's ticket maps to its entry, the claim has no worker
-- slot, and its owner is live. A violation of the first two rules is damage; a lost owner is not. `walk` caches results
-- within one operation.
local function is_wanted(place, claim, walk)
  if walk.wanted[claim.entry] then
    return true
  end
  if redis.call('HGET', P .. 'waiting:' .. place, claim.ticket) ~= claim.entry
    or redis.call('HEXISTS', P .. 'slots:' .. place, claim.ticket) == 1 then
    repaired('queue')
    return false
  end
  if walk.alive[claim.owner] == nil then
    walk.alive[claim.owner] = redis.call('EXISTS', P .. 'coordinator:' .. claim.owner) == 1
  end
  walk.wanted[claim.entry] = walk.alive[claim.owner]
  return walk.alive[claim.owner]
end

-- Removes an entry from the queue, and its ticket if the ticket maps to the entry.
local function drop_claim(place, entry, ticket)
  redis.call('ZREM', P .. 'queue:' .. place, entry)
  if ticket and redis.call('HGET', P .. 'waiting:' .. place, ticket) == entry then
    redis.call('HDEL', P .. 'waiting:' .. place, ticket)
  end
end

local function read_claim(entry)
  local rank, caller, order, cost, ticket, owner = string.match(entry, '^(.-)|(.-)|(.-)|(%d+)|(.-)|(.*)$')
  if not rank then
    repaired('queue')
    return nil
  end
  return { entry = entry, rank = rank, caller = caller, order = order, cost = tonumber(cost), ticket = ticket,
    owner = owner }
end

-- Returns a cache key: the properties of a claim that determine the fitting workers. Within one operation, if no worker
-- fits a claim, no worker fits claims with the same key.
local function kind_of(claim)
  return table.concat({ claim.owner, equal_of(claim.ticket) or '', wiring_of(claim.ticket) or '',
    is_alone(claim.ticket) and 'alone' or '' }, '/')
end

-- Returns the next claim: highest priority, then the caller with the least granted work, then the earliest deadline,
-- then arrival. Callers are scheduled by start-time fair queueing (Goyal, Vin, Cheng 1996): a claim's virtual start
-- time is the virtual finish time of its caller's previous claim, or the current virtual time if that is later. An idle
-- caller therefore accumulates no credit.
--
-- Each iteration handles one caller, one entry without a fitting worker (skipped) or one entry without a waiting
-- coordinator (removed), and advances in the queue. The number of iterations is therefore at most the queue's length.
local function next_claim(place, walk)
  local queue, best, shares, virtual = P .. 'queue:' .. place, nil, nil, nil
  local entry = redis.call('ZRANGE', queue, 0, 0)[1]
  for _ = 1, walk.length do
    if not entry or walk.dropped >= MOST_DROPPED then
      break
    end
    local claim, after = read_claim(entry), '(' .. entry
    if not claim or not is_wanted(place, claim, walk) then
      drop_claim(place, entry, claim and claim.ticket)
      walk.dropped = walk.dropped + 1
    elseif not walk.unfit[kind_of(claim)] then
      if best and claim.rank ~= best.rank then
        break
      end
      shares = shares or P .. 'shares:' .. place .. '|' .. claim.rank
      virtual = virtual or tonumber(redis.call('ZSCORE', shares, '|') or 0)
      claim.shares = shares
      claim.start = math.max(virtual, tonumber(redis.call('ZSCORE', shares, claim.caller) or 0))
      if not best or claim.start < best.start or (claim.start == best.start and claim.order < best.order) then
        best = claim
      end
      after = '(' .. claim.rank .. '|' .. claim.caller .. '|~'
    end
    entry = redis.call('ZRANGEBYLEX', queue, after, '+', 'LIMIT', 0, 1)[1]
  end
  return best
end

-- Charges a granted claim to its caller. Callers whose virtual finish time has passed need no entry and are removed.
local function charge(claim)
  redis.call('ZADD', claim.shares, int(claim.start), '|', int(claim.start + claim.cost), claim.caller)
  redis.call('ZREMRANGEBYSCORE', claim.shares, '-inf', '(' .. int(claim.start))
  redis.call('PEXPIRE', claim.shares, 3600000)
end

-- Returns the set of workers that do not fit a claim's wiring, read once per operation.
local function unfit_for(place, claim, walk)
  local digest = wiring_of(claim.ticket)
  if not digest then
    return {}
  end
  walk.fits[digest] = walk.fits[digest] or fit_of(place, digest)
  return walk.fits[digest].unfit
end

-- Returns the workers that can be granted to a claim: workers that fit its wiring and have the numerics fingerprint of
-- its step checkpoint. If there is no such worker, returns all workers that fit its wiring; the request then restarts
-- from step 0. A hidden worker is never granted to a claim of the previous release.
local function fitting(place, workers, claim, walk)
  local unfit, numerics, able, equal = unfit_for(place, claim, walk), equal_of(claim.ticket), {}, {}
  local is_older = not wiring_of(claim.ticket)
  for _, worker in ipairs(workers) do
    if not unfit[worker.id] and not (is_older and worker.hidden) then
      able[#able + 1] = worker
      if worker.numerics == numerics then
        equal[#equal + 1] = worker
      end
    end
  end
  return #equal > 0 and equal or able
end

-- Grants a worker slot of a worker to a claim. Returns false, without a grant, if the worker's key is missing.
local function grant(place, claim, id, asking)
  local key = P .. 'worker:' .. id
  local info = redis.call('HGET', key, 'info')
  if not info then
    redis.call('HDEL', P .. 'live:' .. place, id)
    repaired('live')
    return false
  end
  redis.call('HINCRBY', key, 'granted', 1)
  copy_worker(place, id)
  redis.call('HSET', P .. 'slots:' .. place, claim.ticket,
    id .. '|' .. claim.owner .. '|' .. int(claim.cost) .. '|' .. int(now))
  charge(claim)
  local request, service = parts_of(claim.ticket, place)
  note(request, 'granted', service, id)
  if claim.ticket ~= asking then
    redis.call('PUBLISH', P .. 'coordinator:' .. claim.owner, 'grant\n' .. claim.ticket .. '\n' .. info)
  end
  drop_claim(place, claim.entry, claim.ticket)
  return true
end

-- Grants free worker slots to waiting claims, including claims with constraints; see dispatch().
--
-- A claim is skipped if no free worker slot fits: its owner avoids the workers with free worker slots, the numerics
-- fingerprint or contract of these workers does not fit, or the claim needs a whole worker and no worker is idle. The
-- first claim that needs a whole worker reserves the worker with the fewest taken worker slots: no other claim is
-- granted there, so the claim is granted once the worker's current requests end. The reservation is recomputed by each
-- dispatch and not stored. Each iteration grants a claim, finds a kind of claim without a fitting worker, or finds a
-- worker without a key, so the number of iterations is at most the number of entries and workers.
local function dispatch_constrained(place, asking, walk)
  local workers = live_workers(place)
  local busy = busy_slots(place, workers)
  local reserved, avoided, is_reserved = {}, {}, false
  walk.unfit = {}
  for _ = 1, walk.length + #workers do
    local claim = next_claim(place, walk)
    if not claim then
      break
    end
    local alone = is_alone(claim.ticket)
    avoided[claim.owner] = avoided[claim.owner] or avoided_by(claim.owner)
    local fits = fitting(place, workers, claim, walk)
    local worker = least_busy(fits, busy, reserved, avoided[claim.owner], alone and 1 or nil)
    if worker and grant(place, claim, worker.id, asking) then
      busy[worker.id] = (busy[worker.id] or 0) + (alone and worker.capacity or 1)
      worker.granted = worker.granted + 1
    elseif worker then
      reserved[worker.id] = true
    elseif not least_busy(workers, busy, reserved, {}) then
      break
    else
      local soonest_idle = alone and not is_reserved and least_busy(fits, busy, {}, avoided[claim.owner], math.huge)
      if soonest_idle then
        is_reserved, reserved[soonest_idle.id] = true, true
      end
      walk.unfit[kind_of(claim)] = true
    end
  end
  forget_index(place)
end

-- Grants free worker slots to waiting claims in queue order, and publishes each grant on the channel of the claim's
-- owner. A grant to the ticket `asking` is not published: ops.claim, which made this call, returns the grant.
--
-- Reads workers one by one from the index. Reads all workers instead while there are hidden workers, once a claim with
-- a constraint (a whole worker, or a numerics fingerprint) is next, and if the key of the chosen worker is missing.
local function dispatch(place, asking)
  local walk = { length = redis.call('ZCARD', P .. 'queue:' .. place), dropped = 0, wanted = {}, alive = {}, unfit = {},
    fits = {} }
  if walk.length == 0 then
    return
  end
  local _, owners, has_hidden = index(place)
  local avoided = {}
  for _ = 1, walk.length do
    local claim = next_claim(place, walk)
    if not claim then
      return
    elseif has_hidden or is_alone(claim.ticket) or equal_of(claim.ticket) then
      return dispatch_constrained(place, asking, walk)
    end
    avoided[claim.owner] = avoided[claim.owner] or avoided_by(claim.owner)
    local id, is_any_free = first_free(place, avoided[claim.owner], unfit_for(place, claim, walk))
    if id and grant(place, claim, id, asking) then
      note_taken(place, id, claim.ticket, 1)
      note_owner(place, claim.owner, owners)
    elseif id then
      return dispatch_constrained(place, asking, walk)
    elseif is_any_free then
      walk.unfit[kind_of(claim)] = true
    else
      return
    end
  end
end

-- Returns the ms until the owner stops avoiding one of the service's live workers; 0 if it avoids none.
local function avoids_for(place, owner)
  local soonest = 0
  for id, each in pairs(avoided_by(owner)) do
    local left = each.till - now
    if left > 0 and (soonest == 0 or left < soonest) and redis.call('ZSCORE', P .. 'workers:' .. place, id) then
      soonest = left
    end
  end
  return soonest
end

-- Makes a coordinator avoid a worker for a pause that doubles with each call, up to LONGEST_PAUSE_MS. Returns the pause
-- in ms. The pause is reset at most AVOIDED_MS after its end, and by a call that succeeds. Other coordinators are not
-- affected.
takes.avoid = { 'owner', 'worker' }
function ops.avoid(a)
  local worker, key, avoided = a.worker, P .. 'avoided:' .. a.owner, avoided_by(a.owner)
  for id, each in pairs(avoided) do
    if each.till + AVOIDED_MS < now then
      redis.call('HDEL', key, id)
      avoided[id] = nil
    end
  end
  local pause = avoided[worker] and math.min(2 * avoided[worker].pause, LONGEST_PAUSE_MS) or FIRST_PAUSE_MS
  redis.call('HSET', key, worker, int(now + pause) .. '|' .. int(pause))
  redis.call('PEXPIRE', key, AVOIDED_MS)
  return pause
end

-- Adds a claim, given as the arguments of ops.claim, to the queue, unless it has a worker slot or is queued. Returns
-- whether it was added. A ticket without an entry is damage.
local function enqueue(a)
  local ticket, place = a.ticket, a.place
  if redis.call('HEXISTS', P .. 'slots:' .. place, ticket) == 1 then
    return false
  end
  local entry = redis.call('HGET', P .. 'waiting:' .. place, ticket)
  if entry and redis.call('ZSCORE', P .. 'queue:' .. place, entry) then
    return false
  elseif entry then
    repaired('waiting')
  end
  local deadline = tonumber(a.deadline)
  local latest = deadline > 0 and math.min(deadline, 9999999999999) or 9999999999999
  -- '!' is a separate rank that precedes the rank of the priority: a request that was handed over has already waited,
  -- and its caller is already charged.
  local rank = string.format('%03d', 100 - tonumber(a.priority)) .. (is_first(ticket) and '!' or '')
  entry = string.format('%s|%s|%013.0f%016.0f|%s|%s|%s', rank, a.caller, latest, next_number(), a.cost, ticket, a.owner)
  redis.call('ZADD', P .. 'queue:' .. place, 0, entry)
  redis.call('HSET', P .. 'waiting:' .. place, ticket, entry)
  local request, service = parts_of(ticket, place)
  if note(request, 'queued', service, '') then
    redis.call('HSET', P .. 'request:' .. request, 'ticket:' .. service, ticket)
  end
  return true
end

-- Claims a worker slot. Idempotent by ticket. The reply to a waiting claim contains the number of live workers that fit
-- its wiring, the ms until its owner's first pause ends, and the fault of one worker if none fits.
takes.claim = {
  'ticket', 'owner',
  'place',     -- model/service
  'priority', 'cost',
  'deadline',  -- ms since 1970, 0 for none
  'caller',    -- a name without '|'
  'wiring',    -- JSON whose digest is a part of the ticket, or ''
}
function ops.claim(a)
  local ticket, place = a.ticket, a.place
  local digest = wiring_of(ticket)
  store_wiring(place, digest, a.wiring)
  -- Repetitions of all waiting claims together cause at most one dispatch per RECHECK_MS.
  if enqueue(a) or redis.call('SET', P .. 'rechecked:' .. place, '1', 'NX', 'PX', RECHECK_MS) then
    dispatch(place, ticket)
  end
  local slot = redis.call('HGET', P .. 'slots:' .. place, ticket)
  local worker = string.match(slot or '', '^(.-)|')
  local info = worker and redis.call('HGET', P .. 'worker:' .. worker, 'info')
  if info then
    return { 'granted', info }
  elseif slot then  -- the owner did not receive the grant, and the worker is lost
    redis.call('HDEL', P .. 'slots:' .. place, ticket)
    forget_index(place)
    if not worker then
      repaired('slot')
    end
  end
  note_silent(place)
  local live, fault = redis.call('ZCARD', P .. 'workers:' .. place), ''
  if digest and live > 0 then
    index(place)
    local fit = fit_of(place, digest)
    live, fault = fit.live, fit.live == 0 and fit.fault or ''
  end
  return { 'waiting', live, avoids_for(place, a.owner), fault }
end

-- Returns the number of free worker slots of live workers with this numerics fingerprint and contract.
takes.spare = {
  'place',  -- model/service
  'numerics', 'contract',
}
function ops.spare(a)
  local workers, free = live_workers(a.place), 0
  local busy, digests = busy_slots(a.place, workers), contracts_of(a.place, workers)
  local digest = server.sha1hex(a.contract)
  for _, worker in ipairs(workers) do
    if worker.numerics == a.numerics and digests[worker.id] == digest then
      free = free + math.max(worker.capacity - (busy[worker.id] or 0), 0)
    end
  end
  return free
end

-- Releases a worker slot, or removes a claim from the queue.
takes.release = {
  'ticket',
  'place',  -- model/service
  'used',   -- ms for which the worker slot was held if the attempt succeeded, else 0
  'computed*',  -- if the worker reported them: compute seconds, steps completed before the attempt, and, only for a
                -- hand-over, steps completed after the attempt
}
function ops.release(a)
  local ticket, place, ms = a.ticket, a.place, tonumber(a.used)
  local slot = redis.call('HGET', P .. 'slots:' .. place, ticket)
  local cost = slot and tonumber(string.match(slot, '|(%d+)|%d+$'))
  if ms > 0 and cost then
    local variant = variant_of(ticket)
    measure(place, ms, cost)
    if variant ~= '' then
      measure(place .. '@' .. variant, ms, cost)
    end
  end
  if a.computed[2] then
    note_computed(ticket, place, tonumber(a.computed[1]), tonumber(a.computed[2]), tonumber(a.computed[3]))
  end
  local request, service = parts_of(ticket, place)
  if ms > 0 then
    settle(request, service)
  end
  local worker, owner = string.match(slot or '', '^(.-)|(.-)|')
  if slot or redis.call('HEXISTS', P .. 'waiting:' .. place, ticket) == 1 then
    note(request, ms > 0 and 'completed' or a.computed[3] and 'handed_over' or 'ended', service, worker or '')
  end
  if ms > 0 and worker then
    redis.call('HDEL', P .. 'avoided:' .. owner, worker)
  end
  if redis.call('HDEL', P .. 'slots:' .. place, ticket) == 1 and worker then
    note_taken(place, worker, ticket, -1)
  end
  leave_queue(place, ticket)
  dispatch(place)
end

-- Returns the tickets of a coordinator that hold a worker slot or wait for one.
takes.claims = { 'place', 'owner' }
function ops.claims(a)
  local place, owner, tickets = a.place, a.owner, {}
  local slots = redis.call('HGETALL', P .. 'slots:' .. place)
  for i = 1, #slots, 2 do
    if string.match(slots[i + 1], '^[^|]*|([^|]*)') == owner then
      tickets[#tickets + 1] = slots[i]
    end
  end
  local waiting = redis.call('HGETALL', P .. 'waiting:' .. place)
  for i = 1, #waiting, 2 do
    if string.match(waiting[i + 1], '|([^|]*)$') == owner then
      tickets[#tickets + 1] = waiting[i]
    end
  end
  return tickets
end
