-- Every change of shared state that must happen as a whole. The files of this folder are one script: SCRIPT_FILES in
-- common/state/connection.py has their order. ARGV[1] names the operation; NAME VALUE pairs follow, which are its arguments.
--
-- Messages are stored serialised and never opened here: a protobuf message followed by another of its type is their
-- merge, so a record grows by appending to `extra`. Time is this server's, in milliseconds, never a caller's.
--
--   fleet:request:<id>             hash   record, extra, state, created, updated, model, owner, epoch, cancel, key, caller, variant,
--                                         token,
--                                         and until the request ends: submission, deaths (its calls that were lost with their worker,
--                                         one line each), point (key of the latest step checkpoint), reached (step of that
--                                         checkpoint), told (number and ids of the latest events), left:<service> (cost of
--                                         the request at that service, until the service has finished the request),
--                                         work:<service> (steps|tokens of a step|shape of its work there), done:<service>
--                                         (fraction of that work that is done), ticket:<service> (of its latest claim there)
--   fleet:events:<id>              stream fields `event`, and `epoch` of the owner that added it, '' for another writer
--   fleet:timeline:<id>            list   what happened, for people: ms|kind|service|worker|number, the newest 256
--   fleet:result:<id>:<epoch>:<file>:<n>  string a chunk of a file of the result
--   fleet:item:<id>:<epoch>:<item>:<n>  string a chunk of an item of a streamed result; only an event makes the item count
--   fleet:checkpoint:<id>:<epoch>-<n>     hash   a step checkpoint by part: 0 its origin, 1 its header, then its chunks
--   fleet:idempotency:<key>        string request id
--   fleet:requests, fleet:ended    zset   ids by sequence number; ended ids by the time their record expires
--   fleet:open:<model>             set    ids that have not ended
--   fleet:open-by:<caller>         set    the same, of a caller with a name
--   fleet:model:<model>            hash   fingerprint, and contract:<service> of processes of the last release
--   fleet:older:<model>/<svc>      string such a contract, moved here for as long as such a process may live
--   fleet:worker:<id>              hash   info, places (its capacity), capacity (the same, 0 where processes of the last
--                                         release must not call it), model, service, granted, lasts (ms of its heartbeat),
--                                         numerics (its numerics fingerprint), contract
--   fleet:contracts:<model>/<svc>  hash   worker -> digest of its contract
--   fleet:wirings:<model>/<svc>    hash   digest -> wiring of claims: the slots that their coordinators supply and read
--   fleet:workers:<model>/<svc>    zset   worker ids by the time their heartbeat runs out
--   fleet:live:<model>/<svc>       hash   worker -> capacity|granted|numerics, copied from its own key, to be read at once
--   fleet:refused:<model>          hash   service | fingerprint -> when, worker id and reason of the latest such refusal
--   fleet:leaving:<id>             string present from a worker's announcement that it ends until it has ended
--   fleet:lost:<model>/<svc>       zset   ids of workers that were lost in the last 10 minutes, by when
--   fleet:accused:<id>             set    requests that lost a call with that worker, until the loss is suspect or not
--   fleet:avoided:<owner>          hash   worker -> until when that coordinator does not call it | the length of the pause
--   fleet:queue:<model>/<svc>      zset   rank | caller | deadline and number | cost | ticket | owner, in lexical order
--   fleet:waiting:<model>/<svc>    hash   ticket -> its entry in the queue
--   fleet:load:<model>/<svc>       zset   live worker -> how loaded it is: slot_index.lua has the sum
--   fleet:indexed:<model>/<svc>    hash   of the previous key, while that is true: capacity (of all workers), owners (of slots),
--                                         hidden (workers that the last release must not call), fit:<digest of a wiring>
--                                         (capacity|number|fault of the workers that fit, then ids of the others)
--   fleet:rechecked:<model>/<svc>  string present for a moment after a claim that waits has asked again
--   fleet:shares:<model>/<svc>|<rank>  zset   callers by the work that they were given, '|' by the virtual time
--   fleet:slots:<model>/<svc>      hash   ticket -> worker | owner | cost | when it was granted
--   fleet:pace:<model>/<svc>       string ms that slots were held and the cost of what held them, of the latest
--   fleet:pace:<model>/<svc>@<variant>  string the same of one variant's requests, whose cost may weigh otherwise
--   fleet:paces:<model>/<svc>      hash   shape -> compute seconds, their steps, tokens of a step, when measured
--   fleet:work:<model>/<svc>       hash   caller, or caller|variant -> cost of open requests that still need the service
--   fleet:needed:<model>/<svc>     string when a request last ceased to need the service
--   fleet:reply:<name>             list   a reply that workers share: its checksum, then its frames
--   fleet:replies, fleet:reply-sizes   zset, hash   names of these by when they expire; their bytes
--   fleet:coordinator:<owner>      string present while that coordinator's heartbeat lasts; also its channel
--   fleet:resigned:<owner>         string present for a day after that coordinator has ended by itself
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
local RESIGNED_MS = 86400000
local REFUSED_MS, MOST_REFUSED = 600000, 16
local RECHECK_MS = 50
local MOST_DROPPED = 1000  -- entries of a queue that one operation removes; the next operation goes on
local MOST_NOTES = 256  -- lines of a request's timeline
local NOTES_MS = 604800000  -- that the timeline of an open request is kept after its latest line
local MOST_EXTRA = 524288  -- bytes of additions after which a record gets no more warnings, only its end
local server = redis
local time = server.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local ops = {}
local takes = {}  -- by operation, the names of its arguments; a name that ends in * is a list, which may be empty

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

-- A call of an operation that does not fit its declaration: a defect of the caller.
local function wrong_call(operation, argument, what)
  local text = 'FLEETCALL ' .. operation .. ': ' .. argument .. ' ' .. what
  error({ err = text .. '; it takes ' .. table.concat(takes[operation], ', ') })
end

-- The arguments of an operation by name. A list repeats its name for each element; a list of pairs has the two in turn.
local function named(operation)
  local found, lists = {}, {}
  for _, name in ipairs(takes[operation]) do
    local list = string.match(name, '^(.*)%*$')
    lists[list or name] = list ~= nil
    found[list or name] = list and {} or nil
  end
  for i = 2, #ARGV, 2 do
    local name, value = ARGV[i], ARGV[i + 1]
    if lists[name] == nil then
      wrong_call(operation, name, 'is not an argument')
    elseif value == nil then
      wrong_call(operation, name, 'has no value')
    elseif lists[name] then
      table.insert(found[name], value)
    elseif found[name] then
      wrong_call(operation, name, 'is given twice')
    else
      found[name] = value
    end
  end
  for _, name in ipairs(takes[operation]) do
    if not lists[string.gsub(name, '%*$', '')] and not found[name] then
      wrong_call(operation, name, 'is missing')
    end
  end
  return found
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

-- Adds serialised events under the epoch of the request's owner; returns their ids.
local function add_events(id, events, epoch)
  local ids = {}
  for i, event in ipairs(events) do
    ids[i] = redis.call('XADD', P .. 'events:' .. id, '*', 'event', event, 'epoch', epoch or '')
  end
  return ids
end

-- Adds a line to the timeline of a request, if the store has that request. Checkpoints beyond half of the lines replace
-- each other: they leave the others their places. Returns whether the request is open.
local function note(id, kind, service, worker, number)
  local key, state = P .. 'timeline:' .. id, server.pcall('HGET', P .. 'request:' .. id, 'state')
  if type(state) ~= 'string' then
    return false
  end
  local line = table.concat({ int(now), kind, service, worker, number or 0 }, '|')
  if tonumber(state) and tonumber(state) >= TERMINAL then
    redis.call('RPUSHX', key, line)  -- it expires with the record
    return false
  end
  if kind == 'checkpoint' and redis.call('LLEN', key) > MOST_NOTES / 2
    and string.match(redis.call('LINDEX', key, -1) or '', '^%d+|checkpoint|') then
    redis.call('LSET', key, -1, line)
  else
    redis.call('RPUSH', key, line)
    redis.call('LTRIM', key, -MOST_NOTES, -1)
  end
  redis.call('PEXPIRE', key, NOTES_MS)
  return true
end

-- The request and the service of a claim, by its ticket and its place.
local function parts_of(ticket, place)
  return string.match(ticket, '^[^/]*'), string.match(place, '[^/]*$')
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
