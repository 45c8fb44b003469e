-- Activities of requests, for dashboards and command-line tools. No operation here reads a whole queue or the whole
-- index of requests: the cost depends on the number of worker slots, the number of requested records and the bounds
-- below.

local MOST_OPEN = 200  -- random open requests, in addition to requests with a worker slot or at a queue's head
local MOST_OPEN_OF_CALLER = 500  -- open requests of one caller that are read
local MOST_NEWEST = 200  -- latest entries of the index that are searched for ended requests
local MOST_CALLERS = 64  -- callers of one rank that the estimate of a queue position distinguishes

-- Returns the callers with claims of one rank in a queue (name, first claim, number of claims), and the total number of
-- claims of callers beyond MOST_CALLERS.
local function callers_of(place, rank)
  local queue, found, rest = P .. 'queue:' .. place, {}, 0
  local last = rank .. '|~'
  local entry = redis.call('ZRANGEBYLEX', queue, '[' .. rank .. '|', '(' .. last, 'LIMIT', 0, 1)[1]
  while entry do
    local claim = read_claim(entry)
    if not claim then
      drop_claim(place, entry)
      break
    elseif #found == MOST_CALLERS then
      rest = redis.call('ZLEXCOUNT', queue, '[' .. entry, '(' .. last)
      break
    end
    local mine, after = rank .. '|' .. claim.caller .. '|', rank .. '|' .. claim.caller .. '|~'
    found[#found + 1] = { name = claim.caller, first = claim,
      count = redis.call('ZLEXCOUNT', queue, '[' .. mine, '(' .. after) }
    entry = redis.call('ZRANGEBYLEX', queue, '(' .. after, '(' .. last, 'LIMIT', 0, 1)[1]
  end
  return found, rest
end

-- Estimates how many claims are granted before this claim: all claims of higher ranks, the caller's own earlier claims,
-- for each other caller of this rank as many claims as round-robin order grants, and all claims of callers beyond
-- MOST_CALLERS. Claims that are not queued yet are not considered.
local function claims_before(place, claim, ranks)
  local queue, rank = P .. 'queue:' .. place, claim.rank
  local key = place .. '|' .. rank
  ranks[key] = ranks[key] or { callers_of(place, rank) }
  local callers, rest = unpack(ranks[key])
  local own = redis.call('ZLEXCOUNT', queue, '[' .. rank .. '|' .. claim.caller .. '|', '(' .. claim.entry)
  local before = redis.call('ZLEXCOUNT', queue, '-', '(' .. rank .. '|') + own + rest
  for _, each in ipairs(callers) do
    if each.name ~= claim.caller then
      before = before + math.min(each.count, each.name < claim.caller and own + 1 or own)
    end
  end
  return before
end

-- Returns whether the coordinator avoids all compatible workers with free worker slots, and the number of compatible
-- live workers.
local function workers_for(place, claim, known)
  local digest = wiring_of(claim.ticket)
  local key = table.concat({ place, claim.owner, digest or '' }, '|')
  if not known[key] then
    index(place)
    local fit = digest and fit_of(place, digest) or { unfit = {}, live = redis.call('ZCARD', P .. 'workers:' .. place) }
    local is_avoiding = not first_free(place, avoided_by(claim.owner), fit.unfit)
      and first_free(place, {}, fit.unfit) ~= nil
    known[key] = { is_avoiding = is_avoiding, live = fit.live }
  end
  return known[key]
end

-- Returns the activity of a request at a service, from its latest ticket: kind, worker, start in ms, claims before its
-- claim, number of compatible live workers.
-- Returns nil if the request does not need the service now, or if the ticket is of a previous coordinator.
local function activity_at(place, request, ticket, is_needed, walk)
  if string.match(ticket, '^[^/]*/([^/]*)') ~= request.owner then
    return nil
  end
  local worker, _, _, since = string.match(redis.call('HGET', P .. 'slots:' .. place, ticket) or '',
    '^(.-)|(.-)|(%d+)|(%d+)$')
  if worker then
    local lives = redis.call('EXISTS', P .. 'worker:' .. worker) == 1
    return { kind = lives and 'running' or 'retry', worker = worker, since = tonumber(since) }
  end
  local entry = redis.call('HGET', P .. 'waiting:' .. place, ticket)
  local claim = entry and read_claim(entry)
  if claim then
    local workers = workers_for(place, claim, walk.workers)
    local kind = workers.live == 0 and 'no_worker' or workers.is_avoiding and 'retry' or 'queued'
    return { kind = kind, before = claims_before(place, claim, walk.ranks), live = workers.live }
  end
  return is_needed and { kind = 'retry' } or nil
end

-- Returns the activities of an open request from read_open(), in the order of its services.
local function activities_of(request, services, walk)
  local found, has_ticket = {}, false
  if walk.alive[request.owner] == nil then
    walk.alive[request.owner] = redis.call('EXISTS', P .. 'coordinator:' .. request.owner) == 1
  end
  if not walk.alive[request.owner] then
    return { { kind = 'take_over', service = '' } }
  end
  for i, service in ipairs(services) do
    local ticket = request.fields[2 * i - 1]
    if ticket then
      has_ticket = true
      local place = request.model .. '/' .. service
      local each = activity_at(place, request, ticket, request.fields[2 * i], walk)
      if each then
        each.service = service
        found[#found + 1] = each
      end
    end
  end
  if #found == 0 then
    -- Coordinators of earlier releases store no tickets.
    local is_known = has_ticket or redis.call('EXISTS', P .. 'timeline:' .. request.id) == 0
    found[1] = { kind = is_known and 'coordinator' or 'unknown', service = '' }
  end
  return found
end

-- Reads a request. Returns nil unless the request is open, belongs to the caller ('' for any) and uses one of the
-- models.
local function read_open(id, caller, models)
  local fields = server.pcall('HMGET', P .. 'request:' .. id, 'state', 'model', 'caller', 'owner', 'created')
  local state = not fields.err and tonumber(fields[1])
  local model = fields[2] or ''
  if not state or state >= TERMINAL or not models[model] or (caller ~= '' and fields[3] ~= caller) then
    return nil
  end
  local names = {}
  for _, service in ipairs(models[model]) do
    names[#names + 1] = 'ticket:' .. service
    names[#names + 1] = 'left:' .. service
  end
  return { id = id, model = model, owner = fields[4] or '', created = tonumber(fields[5]) or 0,
    fields = redis.call('HMGET', P .. 'request:' .. id, unpack(names)) }
end

-- Returns the ids of the requests at the head of a queue: the first of each caller of the highest rank, and the first
-- `most` of the queue.
local function head_ids(place, most)
  local ids = {}
  for i, entry in ipairs(redis.call('ZRANGE', P .. 'queue:' .. place, 0, most - 1)) do
    local claim = read_claim(entry)
    if not claim then
      drop_claim(place, entry)
    else
      for _, caller in ipairs(i == 1 and callers_of(place, claim.rank) or {}) do
        ids[#ids + 1] = (parts_of(caller.first.ticket, place))
      end
      ids[#ids + 1] = (parts_of(claim.ticket, place))
    end
  end
  return ids
end

-- Returns distinct ids of open requests. For a caller: a random sample of its open requests. Else: the requests with a
-- worker slot, the heads of the queues, and a random sample of all open requests.
local function open_ids(a, models, most)
  local found, seen = {}, {}
  local function add(ids)
    for _, id in ipairs(ids) do
      if not seen[id] then
        seen[id], found[#found + 1] = true, id
      end
    end
  end
  if a.caller ~= '' then
    add(redis.call('SRANDMEMBER', P .. 'open-by:' .. a.caller, MOST_OPEN_OF_CALLER))
    return found
  end
  local names = {}
  for model, services in pairs(models) do
    names[#names + 1] = model
    for _, service in ipairs(services) do
      local place, ids = model .. '/' .. service, {}
      for _, slot in ipairs(read_slots(place)) do
        ids[#ids + 1] = (parts_of(slot.ticket, place))
      end
      add(ids)
      add(head_ids(place, most))
    end
  end
  for _, model in ipairs(names) do
    add(redis.call('SRANDMEMBER', P .. 'open:' .. model, math.ceil(MOST_OPEN / #names)))
  end
  return found
end

local ORDER = { running = 2, retry = 1, take_over = 1, queued = 3, no_worker = 3, coordinator = 4, unknown = 4 }

-- Groups open requests by ORDER: retries and take-overs, running, waiting, at their coordinator. Each group is sorted
-- by queue position, then by age, the oldest first.
local function grouped(requests)
  local groups = { {}, {}, {}, {} }
  for _, request in ipairs(requests) do
    local group = 4
    for _, each in ipairs(request.activities) do
      group = math.min(group, ORDER[each.kind])
      request.before = request.before or each.before
    end
    table.insert(groups[group], request)
  end
  for _, group in ipairs(groups) do
    table.sort(group, function(a, b)
      if (a.before or 0) ~= (b.before or 0) then
        return (a.before or 0) < (b.before or 0)
      end
      return a.created < b.created or (a.created == b.created and a.id < b.id)
    end)
  end
  return groups
end

-- Selects at most `most` requests, round-robin over the groups, so that a large group displaces no other group.
local function chosen(groups, most)
  local counts, left = { 0, 0, 0, 0 }, most
  local is_more = true
  while is_more and left > 0 do
    is_more = false
    for i, group in ipairs(groups) do
      if left > 0 and counts[i] < #group then
        counts[i], left, is_more = counts[i] + 1, left - 1, true
      end
    end
  end
  local found = {}
  for i, group in ipairs(groups) do
    for j = 1, counts[i] do
      found[#found + 1] = group[j]
    end
  end
  return found
end

-- Returns the ids of the latest ended requests of a caller ('' for any) and of the models.
local function newest_ended(caller, models, most)
  local found = {}
  for _, id in ipairs(most > 0 and redis.call('ZREVRANGE', P .. 'requests', 0, MOST_NEWEST - 1) or {}) do
    local fields = server.pcall('HMGET', P .. 'request:' .. id, 'state', 'model', 'caller', 'record')
    local state = not fields.err and fields[4] and tonumber(fields[1])
    if state and state >= TERMINAL and models[fields[2] or ''] and (caller == '' or fields[3] == caller) then
      found[#found + 1] = id
      if #found == most then
        break
      end
    end
  end
  return found
end

-- Returns the current time in ms and at most `most` requests: open requests, then the latest ended requests. Each row
-- has the snapshot and the activities of a request. An activity is: kind, service, worker, start in ms, claims before
-- its claim, number of compatible live workers if its claim waits, fields `work` and `done`. Numbers that do not apply
-- are -1.
takes.activities = {
  'caller',   -- name of the caller, '' for all callers
  'most',
  'places*',  -- model/service, of each model in the order of its pipeline
}
function ops.activities(a)
  local models, most, requests, rows = {}, tonumber(a.most), {}, {}
  local walk = { alive = {}, workers = {}, ranks = {} }
  for _, place in ipairs(a.places) do
    local model, service = string.match(place, '^(.*)/([^/]*)$')
    models[model] = models[model] or {}
    table.insert(models[model], service)
    note_silent(place)
  end
  for _, id in ipairs(open_ids(a, models, most)) do
    local request = read_open(id, a.caller, models)
    if request then
      request.activities = activities_of(request, models[request.model], walk)
      requests[#requests + 1] = request
    end
  end
  for _, request in ipairs(chosen(grouped(requests), most)) do
    local shown = {}
    for i, each in ipairs(request.activities) do
      local work = redis.call('HMGET', P .. 'request:' .. request.id, 'work:' .. each.service, 'done:' .. each.service)
      shown[i] = { each.kind, each.service, each.worker or '', int(each.since or -1), each.before or -1,
        each.live or -1, work[1] or '', work[2] or '' }
    end
    rows[#rows + 1] = { snapshot(request.id), shown }
  end
  for _, id in ipairs(newest_ended(a.caller, models, most - #rows)) do
    rows[#rows + 1] = { snapshot(id), {} }
  end
  return { int(now), rows }
end
