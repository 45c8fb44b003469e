-- Every change of shared state that must happen as a whole. ARGV[1] names the operation, the rest are its arguments.
--
-- Messages are stored serialised and never opened here: a protobuf message followed by another of its type is their
-- merge, so a record grows by appending to `extra`. Time is this server's, in milliseconds, never a caller's.
--
--   fleet:request:<id>             hash   record, extra, state, created, updated, model, owner, epoch, cancel, key, caller, variant,
--                                         token,
--                                         and until its end submission, deaths (calls of it that were lost with their worker,
--                                         a line each), point (the key of a checkpoint), reached (its step), told (number and
--                                         ids of the latest events), left:<service> (its cost, until that service is done
--                                         with it)
--   fleet:events:<id>              stream field `event`
--   fleet:result:<id>:<epoch>:<file>:<n>  string a chunk of a file of the result
--   fleet:checkpoint:<id>:<epoch>-<n>     hash   a step checkpoint by part: 0 its origin, 1 its header, then its chunks
--   fleet:idempotency:<key>        string request id
--   fleet:requests, fleet:ended    zset   ids by sequence number; ended ids by the time their record expires
--   fleet:open:<model>             set    ids that have not ended
--   fleet:open-by:<caller>         set    the same, of a caller with a name
--   fleet:model:<model>            hash   fingerprint, contract:<service>
--   fleet:worker:<id>              hash   info, capacity, model, service, granted, lasts (ms of its heartbeat)
--   fleet:workers:<model>/<svc>    zset   worker ids by the time their heartbeat runs out
--   fleet:leaving:<id>             string present from a worker's announcement that it ends until it has ended
--   fleet:lost:<model>/<svc>       zset   ids of workers that were lost in the last 10 minutes, by when
--   fleet:accused:<id>             set    requests that lost a call with that worker, until the loss is suspect or not
--   fleet:avoided:<owner>          hash   worker -> until when that coordinator does not call it | the length of the pause
--   fleet:queue:<model>/<svc>      zset   rank | caller | deadline and number | cost | ticket | owner, in lexical order
--   fleet:waiting:<model>/<svc>    hash   ticket -> its entry in the queue
--   fleet:shares:<model>/<svc>|<rank>  zset   callers by the work that they were given, '|' by the virtual time
--   fleet:slots:<model>/<svc>      hash   ticket -> worker | owner | cost | when it was granted
--   fleet:pace:<model>/<svc>       string ms that slots were held and the cost of what held them, of the latest
--   fleet:pace:<model>/<svc>@<variant>  string the same of one variant's requests, whose cost may weigh otherwise
--   fleet:work:<model>/<svc>       hash   caller, or caller|variant -> cost of open requests that still need the service
--   fleet:reply:<name>             list   a reply that workers share: its checksum, then its frames
--   fleet:replies, fleet:reply-sizes   zset, hash   names of these by when they expire; their bytes
--   fleet:coordinator:<owner>      string present while that coordinator's heartbeat lasts; also its channel
--   fleet:repairs                  hash   kind of damage -> how often an operation found and removed it
--
-- Keys may be missing, evicted, restored from an older copy or of another type. So no loop depends on two keys that
-- agree: each iterates over what it has read, or at most as often as the key had entries. An entry whose partner is
-- missing is removed and counted in fleet:repairs.
--
-- A coordinator's heartbeat is its lease on all requests that it owns. `epoch` is the fencing token: it grows when a
-- request changes hands, and a write with another one is refused. Callers repeat an operation whose answer they have
-- lost, and a network may deliver one long after its caller gave up: done twice or late, each must do no harm.
--
-- The cost of a request is a number that says how much it asks of a service, beside other requests.

local P = 'fleet:'
local TERMINAL = 3
local CHURN_MS = 600000
local FIRST_PAUSE_MS, LONGEST_PAUSE_MS = 200, 5000
local AVOIDED_MS = 60000
local MOST_DROPPED = 1000  -- entries of a queue that one operation removes; the next operation goes on
local MOST_EXTRA = 524288  -- bytes of additions after which a record gets no more warnings, only its end
local server = redis
local time = server.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local ops = {}

-- Counts damage that was found and removed. The counter itself may be of another type.
local function repaired(kind, count)
  local reply = server.pcall('HINCRBY', P .. 'repairs', kind, count or 1)
  if type(reply) == 'table' and reply.err and string.find(reply.err, 'WRONGTYPE', 1, true) then
    server.call('DEL', P .. 'repairs')
    server.call('HINCRBY', P .. 'repairs', kind, count or 1)
  end
end

-- The call() of all operations. A key of another type than the command's holds nothing of the fleet's: it is deleted,
-- and the command repeated. The one exception is the record of a request, which is an error that names the key.
local redis = {}
function redis.call(command, key, ...)
  local reply = server.pcall(command, key, ...)
  if type(reply) ~= 'table' or not reply.err then
    return reply
  end
  if not string.find(reply.err, 'WRONGTYPE', 1, true) then
    error(reply)
  end
  if string.find(key, P .. 'request:', 1, true) == 1 then
    local found = server.call('TYPE', key)
    error({ err = 'FLEETKEY ' .. key .. ' is a ' .. found.ok .. ', not the hash of a request; delete that key' })
  end
  server.call('DEL', key)
  repaired('type')
  return server.call(command, key, ...)
end

local function int(number)
  return string.format('%.0f', number)
end

local function is_open(id)
  local state = tonumber(redis.call('HGET', P .. 'request:' .. id, 'state'))
  return state and state < TERMINAL
end

-- nil where the writer may write, else what keeps it from that.
local function refusal(id, epoch)
  if not is_open(id) then
    return 'ended'
  end
  if redis.call('HGET', P .. 'request:' .. id, 'epoch') ~= epoch then
    return 'lost'
  end
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

-- Notes that a worker of a service was lost, and forgets such losses after 10 minutes.
local function note_loss(place, worker, at)
  local key = P .. 'lost:' .. place
  redis.call('ZADD', key, int(at), worker)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now - CHURN_MS))
  redis.call('PEXPIRE', key, int(CHURN_MS))
end

-- A number above all that were given before, also where the counter was lost or restored from an older copy.
local function next_number()
  local number = redis.call('INCR', P .. 'sequence')
  local newest = tonumber(redis.call('ZREVRANGE', P .. 'requests', 0, 0, 'WITHSCORES')[2])
  if newest and newest >= number then
    number = newest + 1
    redis.call('SET', P .. 'sequence', int(number))
    repaired('sequence')
  end
  return number
end

-- Takes workers whose heartbeat has run out off the list, and notes them as lost unless they left.
local function note_silent(place)
  local key = P .. 'workers:' .. place
  local silent = redis.call('ZRANGEBYSCORE', key, '-inf', int(now), 'WITHSCORES')
  for i = 1, #silent, 2 do
    if redis.call('EXISTS', P .. 'leaving:' .. silent[i]) == 0 then
      note_loss(place, silent[i], tonumber(silent[i + 1]))
    end
  end
  redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now))
end

local function live_workers(place)
  note_silent(place)
  local live = {}
  for _, id in ipairs(redis.call('ZRANGE', P .. 'workers:' .. place, 0, -1)) do
    local fields = redis.call('HMGET', P .. 'worker:' .. id, 'capacity', 'granted', 'info')
    local capacity = tonumber(fields[1])
    if capacity and fields[3] then
      live[#live + 1] = { id = id, capacity = capacity, granted = tonumber(fields[2]) or 0, info = fields[3] }
    end
  end
  return live
end

-- Whether a claim is for all slots of one worker, which its ticket says: no other request may be lost with this one.
local function is_alone(ticket)
  return string.match(ticket, '/alone$') ~= nil
end

-- Drops the slots of dead workers and dead coordinators; returns how many each worker has, and all that are left.
local function busy_slots(place)
  local busy, held, slots = {}, {}, redis.call('HGETALL', P .. 'slots:' .. place)
  for i = 1, #slots, 2 do
    local worker, owner, cost, since = string.match(slots[i + 1], '^(.*)|(.*)|(%d+)|(%d+)$')
    local capacity = worker and redis.call('HGET', P .. 'worker:' .. worker, 'capacity')
    if not worker then
      redis.call('HDEL', P .. 'slots:' .. place, slots[i])
      repaired('slot')
    elseif not capacity or redis.call('EXISTS', P .. 'coordinator:' .. owner) == 0 then
      redis.call('HDEL', P .. 'slots:' .. place, slots[i])
    else
      busy[worker] = (busy[worker] or 0) + (is_alone(slots[i]) and tonumber(capacity) or 1)
      held[#held + 1] = { ticket = slots[i], cost = tonumber(cost), since = tonumber(since) }
    end
  end
  return busy, held
end

-- The variant of the request that a ticket is for; '' for a model with one variant, and for a request that is forgotten.
local function variant_of(ticket)
  local variant = server.pcall('HGET', P .. 'request:' .. string.match(ticket, '^[^/]*'), 'variant')
  return type(variant) == 'string' and variant or ''
end

-- ms per unit of cost at a service, of the latest requests of a variant, else of all variants; nil before there are any.
local function pace_of(place, variant)
  for _, key in ipairs(variant ~= '' and { place .. '@' .. variant, place } or { place }) do
    local ms, of = string.match(redis.call('GET', P .. 'pace:' .. key) or '', '^(%S+) (%S+)$')
    if tonumber(ms) and (tonumber(of) or 0) > 0 then
      return tonumber(ms) / tonumber(of)
    end
  end
end

local function measure(key, ms, cost)
  local held, of = string.match(redis.call('GET', P .. 'pace:' .. key) or '', '^(%S+) (%S+)$')
  redis.call('SET', P .. 'pace:' .. key, string.format('%.3f %.3f',
    ms + 0.8 * (tonumber(held) or 0), cost + 0.8 * (tonumber(of) or 0)), 'PX', 86400000)
end

-- The field of a caller's work with requests of a variant.
local function work_field(caller, variant)
  return variant ~= '' and caller .. '|' .. variant or caller
end

-- What a service has before it, as far as the pace of the latest requests tells; pace is nil before there is one.
-- In ms: `queued` until all that is open is done, `own` for the caller's part of that, `more` for a request of that
-- variant and cost. `callers` have a part in it, this one included, and `capacity` requests are taken at a time.
local function forecast(place, variant, caller, cost)
  local found = { capacity = 0, callers = 1, queued = 0, own = 0, more = 0 }
  for _, worker in ipairs(live_workers(place)) do
    found.capacity = found.capacity + worker.capacity
  end
  found.capacity = math.max(found.capacity, 1)
  found.pace = pace_of(place, variant)
  if not found.pace then
    return found
  end
  local paces, others = { [variant] = found.pace }, {}
  local function pace(each)
    paces[each] = paces[each] or pace_of(place, each) or found.pace
    return paces[each]
  end
  local open = redis.call('HGETALL', P .. 'work:' .. place)
  for i = 1, #open, 2 do
    local who, of = string.match(open[i], '^([^|]*)|?(.*)$')
    local ms = (tonumber(open[i + 1]) or 0) * pace(of) / found.capacity
    found.queued = found.queued + ms
    if who == caller then
      found.own = found.own + ms
    elseif not others[who] then
      others[who] = true
      found.callers = found.callers + 1
    end
  end
  local _, held = busy_slots(place)
  for _, slot in ipairs(held) do
    local ms = slot.cost * pace(variant_of(slot.ticket))
    found.queued = found.queued - math.min(now - slot.since, ms) / found.capacity
  end
  found.more = cost * found.pace / found.capacity
  return found
end

-- Whether a request has to be refused for the work that is open, or for its number before there is a pace to tell the
-- work by: the refusal or nil, and the ms that the slowest service needs for the request alone. A caller who has no
-- more than an equal part of the bound is not refused for what the others have.
local function overload(model, variant, caller, first, last, open, max_work)
  local most, more, unmeasured = 0, 0, false
  for i = first, last, 2 do
    local service = forecast(model .. '/' .. ARGV[i], variant, caller, tonumber(ARGV[i + 1]))
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

-- Drops ended requests whose records have expired from the index.
local function prune_index()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', int(now), 'LIMIT', 0, 100)) do
    redis.call('ZREM', P .. 'ended', id)
    redis.call('ZREM', P .. 'requests', id)
  end
end

-- id, owner, idempotency key, record, submission, model, deadline or 0, most open requests, longest queue,
-- most ms of work, caller, most of theirs, 1 where the store is full, variant, n, n pairs of service and cost, events.
-- Refusals return the ms after which to try again. A full store still answers what it has admitted before.
function ops.admit(id, owner, key, record, submission, model, deadline, max_open, queue_limit, max_work, caller,
  max_theirs, is_full, variant, count)
  count = tonumber(count)
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
  if is_full == '1' then
    return { 'memory' }
  end
  local first, last = 17, 16 + 2 * count
  local open = redis.call('SCARD', P .. 'open:' .. model)
  local busy, alone = overload(model, variant, caller, first, last, open, tonumber(max_work))
  if open >= tonumber(max_open) then
    return { 'crowded', open, alone }
  end
  local theirs = redis.call('SCARD', P .. 'open-by:' .. caller)
  if caller ~= '' and theirs >= tonumber(max_theirs) then
    return { 'quota', theirs, alone }
  end
  for i = first, last, 2 do
    local length = redis.call('ZCARD', P .. 'queue:' .. model .. '/' .. ARGV[i])
    if length >= tonumber(queue_limit) then
      return { 'full', length, alone, ARGV[i] }
    end
  end
  if busy then
    return busy
  end
  redis.call('HSET', P .. 'request:' .. id, 'record', record, 'extra', '', 'state', '1', 'created', int(now),
    'updated', int(now), 'model', model, 'owner', owner, 'epoch', '1', 'key', key, 'caller', caller,
    'variant', variant, 'submission', submission)
  for i = first, last, 2 do
    redis.call('HSET', P .. 'request:' .. id, 'left:' .. ARGV[i], ARGV[i + 1])
    redis.call('HINCRBY', P .. 'work:' .. model .. '/' .. ARGV[i], work_field(caller, variant), ARGV[i + 1])
  end
  redis.call('ZADD', P .. 'requests', int(next_number()), id)
  redis.call('SADD', P .. 'open:' .. model, id)
  if caller ~= '' then
    redis.call('SADD', P .. 'open-by:' .. caller, id)
  end
  if key ~= '' then
    redis.call('SET', P .. 'idempotency:' .. key, id)
  end
  local events = add_events(id, last + 1)
  prune_index()
  return { 'admitted', int(now), snapshot(id), events }
end

-- id, epoch, number of this owner's events before these, new state or '', addition to the record, events. Refused once
-- the request has ended or changed hands. Written again, as its answer was lost, it gets the same answer.
function ops.append(id, epoch, number, state, extra)
  local refused = refusal(id, epoch)
  if refused then
    return { refused }
  end
  local key, ids = P .. 'request:' .. id, {}
  local latest, told = string.match(redis.call('HGET', key, 'told') or '', '^(%d+) ?(.*)$')
  if latest and tonumber(number) <= tonumber(latest) then
    for each in string.gmatch(number == latest and told or '', '%S+') do
      ids[#ids + 1] = each
    end
    return { 'appended', ids }
  end
  if state ~= '' then
    redis.call('HSET', key, 'state', state, 'updated', int(now))
  end
  if redis.call('HSTRLEN', key, 'extra') < MOST_EXTRA then
    extend(id, extra)
  end
  ids = add_events(id, 7)
  redis.call('HSET', key, 'told', number .. ' ' .. table.concat(ids, ' '))
  return { 'appended', ids }
end

-- A request needs a service no more: its cost is open there no more, which counts once.
local function settle(id, service)
  local key = P .. 'request:' .. id
  local fields = redis.call('HMGET', key, 'left:' .. service, 'model', 'caller', 'variant')
  if tonumber(fields[1]) and fields[2] and fields[3] then
    local work, field = P .. 'work:' .. fields[2] .. '/' .. service, work_field(fields[3], fields[4] or '')
    redis.call('HDEL', key, 'left:' .. service)
    if redis.call('HINCRBY', work, field, -tonumber(fields[1])) <= 0 then
      redis.call('HDEL', work, field)
    end
  end
end

local function finish(id, token, state, extra, keep)
  local key = P .. 'request:' .. id
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local service = string.match(field, '^left:(.*)$')
    if service then
      settle(id, service)
    end
  end
  redis.call('HSET', key, 'state', state, 'updated', int(now), 'token', token)
  extend(id, extra)
  local fields = redis.call('HMGET', key, 'model', 'key', 'caller', 'point')
  if fields[4] then
    redis.call('DEL', fields[4])
  end
  redis.call('HDEL', key, 'submission', 'deaths', 'point', 'reached', 'told')
  redis.call('SREM', P .. 'open:' .. (fields[1] or ''), id)
  if fields[3] and fields[3] ~= '' then
    redis.call('SREM', P .. 'open-by:' .. fields[3], id)
  end
  redis.call('ZADD', P .. 'ended', int(now + tonumber(keep)), id)
  redis.call('PEXPIRE', key, keep)
  if fields[2] and fields[2] ~= '' then
    redis.call('PEXPIRE', P .. 'idempotency:' .. fields[2], keep)
  end
end

-- id, epoch, token, state, addition to the record, ms to keep it, events. The owner ends it, once; its own repetition
-- is no loss.
function ops.finish(id, epoch, token, state, extra, keep)
  local refused = refusal(id, epoch)
  if refused then
    local mine = redis.call('HGET', P .. 'request:' .. id, 'token') == token
    return { mine and 'finished' or refused, {} }
  end
  finish(id, token, state, extra, keep)
  local events = add_events(id, 8)
  redis.call('PEXPIRE', P .. 'events:' .. id, keep)
  prune_index()
  return { 'finished', events }
end

-- id, state, ms to keep the record, event. Tells the owner; where that one is dead, the request ends here.
function ops.cancel(id, state, keep)
  local key = P .. 'request:' .. id
  if is_open(id) then
    local owner = redis.call('HGET', key, 'owner') or ''
    redis.call('HSET', key, 'cancel', '1')
    if redis.call('EXISTS', P .. 'coordinator:' .. owner) == 1 then
      redis.call('PUBLISH', P .. 'coordinator:' .. owner, 'cancel\n' .. id)
    else
      finish(id, 'cancel', state, '', keep)
      add_events(id, 5)
      redis.call('PEXPIRE', P .. 'events:' .. id, keep)
    end
  end
  return snapshot(id)
end

-- Fields of a request that the set of open ones names, none of them where that entry is wrong: it is removed then.
local function open_fields(model, id, ...)
  local fields = server.pcall('HMGET', P .. 'request:' .. id, 'state', ...)
  local state = not fields.err and tonumber(table.remove(fields, 1))
  if state and state < TERMINAL then
    return fields
  end
  redis.call('SREM', P .. 'open:' .. model, id)
  repaired('open')
  return {}
end

-- owner, model, the most to take, 1 to look beyond one's own, the ids that it runs. Its own requests that it does not
-- run, and those of dead coordinators, are this one's to run from now on: for each id, epoch, submission, cancel, now
-- and the record. Then the ids of those that it runs and should cancel. Only who lives itself takes anything.
function ops.take_over(owner, model, most, beyond, running)
  local taken, cancels, runs = {}, {}, {}
  if redis.call('EXISTS', P .. 'coordinator:' .. owner) == 0 then
    return { taken, cancels }
  end
  for id in string.gmatch(running, '%S+') do
    runs[id] = true
  end
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'open:' .. model)) do
    local key = P .. 'request:' .. id
    local fields = open_fields(model, id, 'owner', 'cancel', 'submission')
    local is_own = fields[1] == owner
    if is_own and runs[id] then
      if fields[2] then
        cancels[#cancels + 1] = id
      end
    elseif #taken < tonumber(most)
      and (is_own or beyond == '1' and fields[1] and redis.call('EXISTS', P .. 'coordinator:' .. fields[1]) == 0) then
      redis.call('HSET', key, 'owner', owner)
      redis.call('HDEL', key, 'told')
      local epoch = redis.call('HINCRBY', key, 'epoch', 1)
      taken[#taken + 1] = { id, epoch, fields[3] or '', fields[2] or '0', int(now), snapshot(id) }
    end
  end
  return { taken, cancels }
end

-- The calls of a request that were lost with their worker, in order. Such a loss is `open` until the worker's heartbeat
-- has run out, and `suspect` then; `cleared` if the worker was announced meanwhile or left. `stage` counts the services of
-- the request, `reached` is the step of the checkpoint that was stored at the time.
local function read_losses(id)
  local losses = {}
  for line in string.gmatch(redis.call('HGET', P .. 'request:' .. id, 'deaths') or '', '[^\n]+') do
    local worker, service, stage, reached, at, due, state, churn =
      string.match(line, '^(.-)|(.-)|(%d+)|(%d+)|(%d+)|(%d+)|(%a+)|(%d)$')
    if worker then
      losses[#losses + 1] = { worker = worker, service = service, stage = stage, reached = reached, at = tonumber(at),
        due = tonumber(due), state = state, churn = churn == '1' }
    end
  end
  return losses
end

local function write_losses(id, losses)
  local lines = {}
  for i, loss in ipairs(losses) do
    lines[i] = table.concat({ loss.worker, loss.service, loss.stage, loss.reached, int(loss.at), int(loss.due), loss.state,
      loss.churn and '1' or '0' }, '|')
  end
  redis.call('HSET', P .. 'request:' .. id, 'deaths', table.concat(lines, '\n'))
end

-- Whether a worker of that service which did not run the request was lost within 10 minutes of the loss.
local function is_in_churn(place, loss, ran)
  local lost = redis.call('ZRANGEBYSCORE', P .. 'lost:' .. place, int(loss.at - CHURN_MS), int(loss.at + CHURN_MS))
  for _, worker in ipairs(lost) do
    if not ran[worker] then
      return true
    end
  end
  return false
end

-- Decides what can be decided by now. Returns for each loss that is not cleared worker, service, stage, reached, 1 if it
-- is suspect, 1 if it is in churn, and the ms until it is decided.
local function judge(id)
  local losses, ran, noted, rows = read_losses(id), {}, {}, {}
  local model = redis.call('HGET', P .. 'request:' .. id, 'model') or ''
  for _, loss in ipairs(losses) do
    ran[loss.worker] = true
  end
  for _, loss in ipairs(losses) do
    local place, key = model .. '/' .. loss.service, P .. 'worker:' .. loss.worker
    if not noted[place] then
      noted[place] = true
      note_silent(place)
    end
    if loss.state == 'open' and loss.due <= now then
      -- A worker that runs an older script clears nobody when it is announced. Its heartbeat of before has run out.
      local is_older = redis.call('EXISTS', key) == 1 and redis.call('HEXISTS', key, 'lasts') == 0
      loss.state = is_older and 'cleared' or 'suspect'
    end
    if loss.state ~= 'cleared' then
      local churn = loss.churn or is_in_churn(place, loss, ran)
      loss.churn = churn and loss.state == 'suspect'
      rows[#rows + 1] = { loss.worker, loss.service, loss.stage, loss.reached, loss.state == 'suspect' and 1 or 0,
        churn and 1 or 0, int(math.max(loss.due - now, 0)) }
    end
  end
  if #losses > 0 then
    write_losses(id, losses)
  end
  return rows
end

-- A worker lives, or left by itself: losses of it that are not decided yet do not count.
local function clear(worker)
  local key = P .. 'accused:' .. worker
  for _, id in ipairs(redis.call('SMEMBERS', key)) do
    local losses = is_open(id) and read_losses(id) or {}
    for _, loss in ipairs(losses) do
      if loss.worker == worker and loss.due > now then
        loss.state = 'cleared'
      end
    end
    if #losses > 0 then
      write_losses(id, losses)
    end
  end
  redis.call('DEL', key)
end

-- id, epoch, service, number of that service, worker, ms of a heartbeat where the store does not know it. A call that had
-- begun there was lost. Returns the same as losses.
function ops.death(id, epoch, service, stage, worker, lasts)
  if refusal(id, epoch) then
    return {}
  end
  local key = P .. 'request:' .. id
  local losses = {}
  for _, loss in ipairs(read_losses(id)) do
    if loss.worker == worker and loss.state ~= 'cleared' then
      return judge(id)  -- reported twice
    elseif loss.worker ~= worker then
      losses[#losses + 1] = loss
    end
  end
  if redis.call('EXISTS', P .. 'leaving:' .. worker) == 0 then
    lasts = tonumber(redis.call('HGET', P .. 'worker:' .. worker, 'lasts')
      or math.max(tonumber(lasts), redis.call('PTTL', P .. 'worker:' .. worker) + 2))
    losses[#losses + 1] = { worker = worker, service = service, stage = stage,
      reached = redis.call('HGET', key, 'reached') or '0', at = now, due = now + lasts, state = 'open', churn = false }
    write_losses(id, losses)
    note_loss(redis.call('HGET', key, 'model') .. '/' .. service, worker, now)
    redis.call('SADD', P .. 'accused:' .. worker, id)
    redis.call('PEXPIRE', P .. 'accused:' .. worker, int(lasts))
  end
  return judge(id)
end

-- id, epoch. The losses that count, or may count; none where the request is not that owner's any more.
function ops.losses(id, epoch)
  if refusal(id, epoch) then
    return {}
  end
  return judge(id)
end

-- id, epoch, key of the checkpoint, its step. It takes the place of the one before, but not of a later one of its epoch.
function ops.checkpoint(id, epoch, point, step)
  local key = P .. 'request:' .. id
  local before = redis.call('HGET', key, 'point')
  local since, latest = string.match(before or '', ':(%d+)%-(%d+)$')
  local is_late = since == epoch and tonumber(latest) > tonumber(string.match(point, '%-(%d+)$'))
  if is_late or refusal(id, epoch) then
    redis.call('DEL', point)
    return 0
  end
  if before and before ~= point then
    redis.call('DEL', before)
  end
  redis.call('HSET', key, 'point', point, 'reached', step)
  return 1
end

-- owner, ms that the beat lasts
function ops.beat(owner, lasts)
  redis.call('SET', P .. 'coordinator:' .. owner, '1', 'PX', lasts)
end

function ops.resign(owner)
  redis.call('DEL', P .. 'coordinator:' .. owner, P .. 'avoided:' .. owner)
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
  return claim.owner .. (is_alone(claim.ticket) and '/alone' or '')
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

-- Hands free slots to those who wait, in order. Coordinators hear of theirs on their channels. Returns the live workers.
--
-- A claim that no free slot fits is passed over: its owner avoids the workers that have one, or it is for a whole worker
-- and none is idle. The first of the latter kind reserves the worker that is idle soonest: nobody else gets a slot there,
-- so that the claim's turn comes after the requests that the worker has now. The reservation is not stored: it lasts while
-- the claim waits, and ends with it. Each iteration grants a claim or finds a kind of claim that does not fit, and there
-- are no more iterations than entries.
local function dispatch(place, asking)
  local workers = live_workers(place)
  local busy = busy_slots(place)
  local walk = { length = redis.call('ZCARD', P .. 'queue:' .. place), dropped = 0, wanted = {}, alive = {}, unfit = {} }
  local reserved, avoided, is_reserved = {}, {}, false
  for _ = 1, walk.length do
    local claim = next_claim(place, walk)
    if not claim then
      break
    end
    local alone = is_alone(claim.ticket)
    avoided[claim.owner] = avoided[claim.owner] or avoided_by(claim.owner)
    local worker = least_busy(workers, busy, reserved, avoided[claim.owner], alone and 1 or nil)
    if worker then
      busy[worker.id] = (busy[worker.id] or 0) + (alone and worker.capacity or 1)
      worker.granted = redis.call('HINCRBY', P .. 'worker:' .. worker.id, 'granted', 1)
      redis.call('HSET', P .. 'slots:' .. place, claim.ticket,
        worker.id .. '|' .. claim.owner .. '|' .. int(claim.cost) .. '|' .. int(now))
      charge(claim)
      if claim.ticket ~= asking then
        redis.call('PUBLISH', P .. 'coordinator:' .. claim.owner, 'grant\n' .. claim.ticket .. '\n' .. worker.info)
      end
      drop_claim(place, claim.entry, claim.ticket)
    elseif not least_busy(workers, busy, reserved, {}) then
      break
    else
      local sparing = alone and not is_reserved and least_busy(workers, busy, {}, avoided[claim.owner], math.huge)
      if sparing then
        is_reserved, reserved[sparing.id] = true, true
      end
      walk.unfit[kind_of(claim)] = true
    end
  end
  return workers
end

-- Ms until an owner calls one of these workers again that it avoids, 0 where it avoids none.
local function avoids_for(owner, workers)
  local soonest, avoided = 0, avoided_by(owner)
  for _, worker in ipairs(workers) do
    local left = (avoided[worker.id] and avoided[worker.id].till or now) - now
    if left > 0 and (soonest == 0 or left < soonest) then
      soonest = left
    end
  end
  return soonest
end

-- owner, worker. That coordinator does not call the worker for a pause that doubles each time: nobody else is kept from
-- it. Returns the pause in ms. Forgotten after a minute, or with a call that succeeds.
function ops.avoid(owner, worker)
  local key, avoided = P .. 'avoided:' .. owner, avoided_by(owner)
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

-- Puts a claim in the queue, unless it has a slot or a place there. A ticket without an entry, and an entry without its
-- ticket, are damage.
local function enqueue(ticket, place, owner, priority, deadline, caller, cost)
  if redis.call('HEXISTS', P .. 'slots:' .. place, ticket) == 1 then
    return
  end
  local entry = redis.call('HGET', P .. 'waiting:' .. place, ticket)
  if entry and redis.call('ZSCORE', P .. 'queue:' .. place, entry) then
    return
  elseif entry then
    repaired('waiting')
  end
  local latest = tonumber(deadline) > 0 and math.min(tonumber(deadline), 9999999999999) or 9999999999999
  entry = string.format('%03d|%s|%013.0f%016.0f|%s|%s|%s', 100 - tonumber(priority), caller, latest, next_number(),
    cost, ticket, owner)
  redis.call('ZADD', P .. 'queue:' .. place, 0, entry)
  redis.call('HSET', P .. 'waiting:' .. place, ticket, entry)
end

-- ticket, model/service, owner, priority, deadline or 0, caller (a name without '|'), cost. Asking again with the same
-- ticket changes nothing. One that waits gets the number of live workers, and the ms until its owner stops avoiding one.
function ops.claim(ticket, place, owner, priority, deadline, caller, cost)
  enqueue(ticket, place, owner, priority, deadline, caller, cost)
  local workers = dispatch(place, ticket)
  local slot = redis.call('HGET', P .. 'slots:' .. place, ticket)
  local info = slot and redis.call('HGET', P .. 'worker:' .. string.match(slot, '^(.-)|'), 'info')
  if info then
    return { 'granted', info }
  elseif slot then
    redis.call('HDEL', P .. 'slots:' .. place, ticket)
    repaired('slot')
  end
  return { 'waiting', #workers, avoids_for(owner, workers) }
end

-- ticket, model/service, ms that the slot was of use or 0. Gives back a slot, or a place in the queue.
function ops.release(ticket, place, ms)
  local slot = redis.call('HGET', P .. 'slots:' .. place, ticket)
  ms = tonumber(ms)
  local cost = slot and tonumber(string.match(slot, '|(%d+)|%d+$'))
  if ms > 0 and cost then
    local variant = variant_of(ticket)
    measure(place, ms, cost)
    if variant ~= '' then
      measure(place .. '@' .. variant, ms, cost)
    end
  end
  if ms > 0 then
    settle(string.match(ticket, '^[^/]*'), string.match(place, '[^/]*$'))
  end
  if ms > 0 and slot then
    local worker, owner = string.match(slot, '^(.-)|(.-)|')
    redis.call('HDEL', P .. 'avoided:' .. owner, worker)
  end
  redis.call('HDEL', P .. 'slots:' .. place, ticket)
  leave_queue(place, ticket)
  dispatch(place)
end

-- worker, model, service, capacity, info, ms that the beat lasts. A beat that comes after its worker left is late.
function ops.announce(worker, model, service, capacity, info, lasts)
  if redis.call('EXISTS', P .. 'leaving:' .. worker) == 1 then
    return
  end
  local place = model .. '/' .. service
  if redis.call('EXISTS', P .. 'worker:' .. worker) == 1 then
    redis.call('ZREM', P .. 'lost:' .. place, worker)
  end
  redis.call('HSET', P .. 'worker:' .. worker, 'model', model, 'service', service, 'capacity', capacity, 'info', info,
    'lasts', lasts)
  redis.call('HSETNX', P .. 'worker:' .. worker, 'granted', '0')
  redis.call('PEXPIRE', P .. 'worker:' .. worker, lasts)
  redis.call('ZADD', P .. 'workers:' .. place, int(now + tonumber(lasts)), worker)
  redis.call('PEXPIRE', P .. 'workers:' .. place, int(tonumber(lasts) + CHURN_MS))
  clear(worker)
  dispatch(place)
end

-- worker, ms that this is remembered. It ends by itself: it gets no new request, and calls of it that are lost from now on
-- are no request's fault.
function ops.leaving(worker, lasts)
  redis.call('SET', P .. 'leaving:' .. worker, '1', 'PX', lasts)
  local fields = redis.call('HMGET', P .. 'worker:' .. worker, 'model', 'service')
  if fields[1] and fields[2] then
    redis.call('ZREM', P .. 'workers:' .. fields[1] .. '/' .. fields[2], worker)
    redis.call('ZREM', P .. 'lost:' .. fields[1] .. '/' .. fields[2], worker)
  end
  redis.call('DEL', P .. 'worker:' .. worker)
  clear(worker)
end

-- model/service, owner. The tickets of that coordinator that have a slot or wait for one.
function ops.claims(place, owner)
  local tickets = {}
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

-- name, ms that it is kept from now on
function ops.touch_reply(name, lasts)
  if redis.call('PEXPIRE', P .. 'reply:' .. name, lasts) == 1 then
    redis.call('ZADD', P .. 'replies', 'XX', int(now + tonumber(lasts)), name)
    redis.call('PEXPIRE', P .. 'replies', lasts)
    redis.call('PEXPIRE', P .. 'reply-sizes', lasts)
  end
end

local function drop_reply(name)
  redis.call('DEL', P .. 'reply:' .. name)
  redis.call('ZREM', P .. 'replies', name)
  redis.call('HDEL', P .. 'reply-sizes', name)
end

-- Bytes by name of the shared replies. A size without a reply, and a reply without a size, are removed.
local function reply_sizes()
  local sizes, fields, known = {}, redis.call('HGETALL', P .. 'reply-sizes'), {}
  for _, name in ipairs(redis.call('ZRANGE', P .. 'replies', 0, -1)) do
    known[name] = true
  end
  for i = 1, #fields, 2 do
    sizes[fields[i]] = known[fields[i]] and tonumber(fields[i + 1])
    if not sizes[fields[i]] then
      drop_reply(fields[i])
      repaired('reply')
    end
  end
  for name in pairs(known) do
    if not sizes[name] then
      drop_reply(name)
      repaired('reply')
    end
  end
  return sizes
end

-- key of its parts, name, its bytes, most bytes of all, ms that it is kept. Those unused for longest make room.
function ops.keep_reply(parts, name, bytes, most, lasts)
  for _, expired in ipairs(redis.call('ZRANGEBYSCORE', P .. 'replies', '-inf', int(now))) do
    drop_reply(expired)
  end
  drop_reply(name)
  if redis.call('EXISTS', parts) == 0 then
    return
  end
  local sizes, total = reply_sizes(), tonumber(bytes)
  for _, size in pairs(sizes) do
    total = total + size
  end
  for _, oldest in ipairs(redis.call('ZRANGE', P .. 'replies', 0, -1)) do
    if total <= tonumber(most) then
      break
    end
    total = total - (sizes[oldest] or 0)
    drop_reply(oldest)
  end
  if total > tonumber(most) then
    redis.call('DEL', parts)
    return
  end
  redis.call('RENAME', parts, P .. 'reply:' .. name)
  redis.call('ZADD', P .. 'replies', int(now + tonumber(lasts)), name)
  redis.call('HSET', P .. 'reply-sizes', name, bytes)
  for _, key in ipairs({ 'reply:' .. name, 'replies', 'reply-sizes' }) do
    redis.call('PEXPIRE', P .. key, lasts)
  end
end

-- A full server refuses a script's first write that takes memory, and none after another write: heartbeats, slots and
-- ends of accepted requests go on, new requests and shared replies do not.
if ARGV[1] ~= 'admit' and ARGV[1] ~= 'keep_reply' then
  server.pcall('DEL', P .. 'none')
end

-- A failure is a reply of one line, without the place in this file that a traceback has. Some servers turn the table
-- of an error into its text. An error of the server begins with its code in capital letters.
local succeeded, reply = pcall(ops[ARGV[1]], unpack(ARGV, 2))
if succeeded then
  return reply
end
local failure = string.gsub(type(reply) == 'table' and reply.err or tostring(reply), '^@?user_script: ?%d+: %-?', '')
if not string.find(failure, '^%u+ ') or string.find(failure, '^ERR ') then
  failure = 'FLEETSTORE ' .. ARGV[1] .. ' cannot use what the store holds: ' .. failure
end
return { err = failure }
