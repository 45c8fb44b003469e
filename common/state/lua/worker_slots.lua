-- Until when a coordinator does not call which workers, and the length of each pause, in ms.
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

-- The live worker that has the fewest slots taken, and fewer than `most` or than its capacity; among equals the one that
-- got the fewest so far. None that is `reserved` (a set of ids), nor one that is avoided by now.
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

-- Whether a claim is one that a living coordinator waits for: its ticket leads back to its entry, it has no slot yet.
-- Only a dead coordinator is no damage. `walk` caches the answers within one operation.
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

-- Removes an entry from the queue, and its ticket if that leads back to the entry.
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

-- What decides which workers fit a claim. Once none fits a claim, none fits others of its kind within one operation.
local function kind_of(claim)
  return table.concat({ claim.owner, equal_of(claim.ticket) or '', wiring_of(claim.ticket) or '',
    is_alone(claim.ticket) and 'alone' or '' }, '/')
end

-- Who is next: of the highest priority, of the caller who was given the least work, the earliest deadline, the first.
-- This is start-time fair queueing (Goyal, Vin, Cheng 1996): a claim starts when its caller's last one ends, in virtual
-- time, but not in the past, so that nobody saves up a share by staying away. The queue is walked a step a caller, and
-- a step for each entry that fits no worker (passed over) or that nobody waits for (removed). Each step is further on:
-- there are no more than entries.
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

-- Writes down that a claim was granted. Who is behind the virtual time afterwards is as good as new, and forgotten.
local function charge(claim)
  redis.call('ZADD', claim.shares, int(claim.start), '|', int(claim.start + claim.cost), claim.caller)
  redis.call('ZREMRANGEBYSCORE', claim.shares, '-inf', '(' .. int(claim.start))
  redis.call('PEXPIRE', claim.shares, 3600000)
end

-- The set of workers that do not fit a claim's wiring, read once within one operation.
local function unfit_for(place, claim, walk)
  local digest = wiring_of(claim.ticket)
  if not digest then
    return {}
  end
  walk.fits[digest] = walk.fits[digest] or fit_of(place, digest)
  return walk.fits[digest].unfit
end

-- The workers that a claim may get: of those that fit its wiring the ones with the numerics fingerprint that its checkpoint
-- needs, as long as there are any. On the others the request would have to start again. A claim of the last release gets
-- no hidden worker.
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

-- Gives a claim a slot of a worker, unless the worker's key was lost: then nothing is granted and false returned.
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

-- Hands free slots to those who wait, where their claims ask for more than any free slot; see dispatch.
--
-- A claim that no free slot fits is passed over: its owner avoids the workers that have one, or they have another
-- numerics fingerprint than its checkpoint needs, or a contract that does not fit its wiring, or it is for a whole worker
-- and none is idle. The first of the latter
-- kind reserves the worker that is idle soonest: nobody else gets a slot there, so that the claim's turn comes after the
-- requests that the worker has now. The reservation is not stored: it lasts while the claim waits, and ends with it.
-- Each iteration grants a claim, finds a kind of claim that does not fit, or finds a worker that has lost its key; there
-- are no more iterations than entries and workers.
local function dispatch_by_wishes(place, asking, walk)
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
      local sparing = alone and not is_reserved and least_busy(fits, busy, {}, avoided[claim.owner], math.huge)
      if sparing then
        is_reserved, reserved[sparing.id] = true, true
      end
      walk.unfit[kind_of(claim)] = true
    end
  end
  forget_index(place)
end

-- Hands free slots to those who wait, in order. Coordinators hear of theirs on their channels.
--
-- Workers are read one by one from the index. Only the first claim with a wish, for a whole worker or for one with a
-- numerics fingerprint, needs all of them; so does every claim while there are hidden workers.
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
      return dispatch_by_wishes(place, asking, walk)
    end
    avoided[claim.owner] = avoided[claim.owner] or avoided_by(claim.owner)
    local id, is_any_free = first_free(place, avoided[claim.owner], unfit_for(place, claim, walk))
    if id and grant(place, claim, id, asking) then
      note_taken(place, id, claim.ticket, 1)
      note_owner(place, claim.owner, owners)
    elseif id then
      return dispatch_by_wishes(place, asking, walk)
    elseif is_any_free then
      walk.unfit[kind_of(claim)] = true
    else
      return
    end
  end
end

-- Ms until an owner calls one of the live workers again that it avoids, 0 where it avoids none.
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

-- A coordinator does not call a worker for a pause that doubles each time; other coordinators do. Returns the pause in ms.
-- Forgotten after a minute, or with a call that succeeds.
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

-- Puts a claim, given as the arguments of ops.claim, in the queue, unless it has a slot or a place there. Returns whether
-- it did. A ticket without an entry, and an entry without its ticket, are damage.
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
  -- The '!' makes a rank of its own, before that of the priority: a request that was handed over has waited already,
  -- and its caller has been charged for it.
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

-- Claims a slot. The same ticket claims once, however often it asks. One that waits gets the number of live workers that fit
-- its wiring, the ms until its owner stops avoiding one, and, where none fits, the fault of one.
takes.claim = {
  'ticket', 'owner',
  'place',     -- model/service
  'priority', 'cost',
  'deadline',  -- ms since 1970, 0 for none
  'caller',    -- a name without '|'
  'wiring',    -- the text whose digest the ticket has, or ''
}
function ops.claim(a)
  local ticket, place = a.ticket, a.place
  local digest = wiring_of(ticket)
  keep_wiring(place, digest, a.wiring)
  -- Claims that wait ask again; however many do, the workers are read no more often than RECHECK_MS says.
  if enqueue(a) or redis.call('SET', P .. 'rechecked:' .. place, '1', 'NX', 'PX', RECHECK_MS) then
    dispatch(place, ticket)
  end
  local slot = redis.call('HGET', P .. 'slots:' .. place, ticket)
  local worker = string.match(slot or '', '^(.-)|')
  local info = worker and redis.call('HGET', P .. 'worker:' .. worker, 'info')
  if info then
    return { 'granted', info }
  elseif slot then  -- granted while its owner could not hear of it, and the worker has died since
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

-- The free slots of the live workers with that numerics fingerprint and that contract, which can take the same claims.
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

-- Gives back a slot, or a place in the queue.
takes.release = {
  'ticket',
  'place',  -- model/service
  'used',   -- ms that a request took which succeeded, else 0
  'computed*',  -- where the worker reported it: its compute seconds, the steps that an earlier attempt had done, and for
                -- an attempt that was handed over the steps that are done since then
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

-- The tickets of a coordinator that have a slot or wait for one; `place` is model/service.
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
