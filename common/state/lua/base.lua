-- Atomic operations on the fleet's shared state. The files of this directory form one Redis script, concatenated in the
-- order of SCRIPT_FILES in common/state/connection.py. ARGV[1] is the operation; its arguments follow as pairs of
-- NAME and VALUE.
--
-- Protobuf messages are stored serialized and never parsed here. Two concatenated messages of one type parse as their
-- merge, so `extra` is appended to a record. All times are of this server's clock, in ms since 1970.
--
-- Terms: a `place` is the queue of one service of one model, named model/service. A worker slot is the right to run one
-- request on a worker; a `slot` of a contract or a wiring is the name of an artifact. A `claim` waits at a place for a
-- worker slot; its `ticket` is its id. A `rank` is the queue class of a claim: its priority, and whether it precedes
-- other claims of this priority (see is_first() in slot_index.lua).
--
--   fleet:request:<id>                    hash   record, extra, state, created, updated, model, owner, epoch, cancel,
--                                                key, caller, variant, token; and, until the request ends:
--                                                - submission
--                                                - deaths: calls of the request that were lost with their worker, one
--                                                  line each
--                                                - point: key of the latest step checkpoint
--                                                - reached: step of that step checkpoint
--                                                - told: number of events before the latest append in this epoch,
--                                                  then the ids of the appended events
--                                                - left:<service>: cost of the request at that service, until the
--                                                  service has finished the request
--                                                - work:<service>: steps|tokens of a step|shape of the request's work
--                                                  at that service
--                                                - done:<service>: fraction of that work that is done
--                                                - ticket:<service>: ticket of the request's latest claim at that
--                                                  service
--   fleet:events:<id>                     stream fields `event`, and `epoch` of the owner that added the event, '' for
--                                                an event of the operation admit or cancel
--   fleet:timeline:<id>                   list   timeline entries ms|kind|service|worker|number, the latest 256
--   fleet:result:<id>:<epoch>:<file>:<n>  string a chunk of a file of the result
--   fleet:item:<id>:<epoch>:<item>:<n>    string a chunk of an item of a streamed result; valid if an event refers to
--                                                the item
--   fleet:checkpoint:<id>:<epoch>-<n>     hash   a step checkpoint by part: 0 its origin, 1 its header, then its chunks
--   fleet:idempotency:<key>               string request id
--   fleet:sequence                        string the latest number of a request or of a queue entry
--   fleet:requests                        zset   ids of all requests by sequence number
--   fleet:ended                           zset   ids of ended requests by the time at which their record expires
--   fleet:open:<model>                    set    ids of requests that have not ended
--   fleet:open-by:<caller>                set    ids of a named caller's requests that have not ended
--   fleet:model:<model>                   hash   fingerprint, and contract:<service> of processes of the previous
--                                                release
--   fleet:older:<model>/<svc>             string contract:<service> of the previous release, while a process of that
--                                                release may live
--   fleet:worker:<id>                     hash   - info, model, service, contract
--                                                - numerics: numerics fingerprint
--                                                - lasts: heartbeat TTL in ms
--                                                - granted: number of claims granted so far
--                                                - places: capacity of the worker
--                                                - capacity: equal to places, or 0 if coordinators of the previous
--                                                  release must not call the worker
--   fleet:contracts:<model>/<svc>         hash   worker -> digest of its contract
--   fleet:wirings:<model>/<svc>           hash   digest -> wiring of claims: the slots that their coordinators supply
--                                                and read
--   fleet:workers:<model>/<svc>           zset   worker ids by the time at which their heartbeat expires
--   fleet:live:<model>/<svc>              hash   worker -> capacity|granted|numerics, copied from fleet:worker so that
--                                                one command reads these fields of all workers
--   fleet:refused:<model>                 hash   service|fingerprint -> time, worker id and reason of the latest such
--                                                refusal
--   fleet:leaving:<id>                    string exists while a worker shuts down
--   fleet:lost:<model>/<svc>              zset   ids of workers that were lost in the last 10 minutes, by time of loss
--   fleet:accused:<id>                    set    requests that lost a call with that worker, while the loss is
--                                                undecided
--   fleet:avoided:<owner>                 hash   worker -> time until which that coordinator does not call it|length of
--                                                the pause
--   fleet:queue:<model>/<svc>             zset   rank | caller | deadline and number | cost | ticket | owner, in
--                                                lexical order
--   fleet:waiting:<model>/<svc>           hash   ticket -> its entry in the queue
--   fleet:load:<model>/<svc>              zset   live worker -> load score, see load_score() in slot_index.lua
--   fleet:indexed:<model>/<svc>           hash   exists while fleet:load is valid:
--                                                - capacity: total capacity of the workers that are not hidden
--                                                - owners: coordinators that hold worker slots
--                                                - hidden: number of workers that the previous release must not call
--                                                - fit:<digest of a wiring>: capacity and number of the workers that
--                                                  fit, and the fault of one other worker, separated by |; then
--                                                  the ids of all other workers
--   fleet:rechecked:<model>/<svc>         string rate limit: exists for RECHECK_MS after a waiting claim was repeated
--   fleet:shares:<model>/<svc>|<rank>     zset   caller -> virtual finish time of its latest claim, '|' -> virtual time
--   fleet:slots:<model>/<svc>             hash   taken worker slots: ticket -> worker|owner|cost|time of the grant
--   fleet:pace:<model>/<svc>              string decaying sums over the latest requests: ms for which the requests held
--                                                worker slots, and cost of the requests
--   fleet:pace:<model>/<svc>@<variant>    string the same sums over the requests of one variant
--   fleet:paces:<model>/<svc>             hash   shape -> decaying sums of compute seconds and of steps, then tokens of
--                                                a step, time of the latest measurement
--   fleet:work:<model>/<svc>              hash   caller, or caller|variant -> cost of open requests that still need the
--                                                service
--   fleet:needed:<model>/<svc>            string time at which a request last stopped needing the service
--   fleet:reply:<name>                    list   a reply that workers share: its checksum, then its frames
--   fleet:reply-parts:<random>            list   the same list while it is written
--   fleet:replies                         zset   names of shared replies by time of expiry
--   fleet:reply-sizes                     hash   name of a shared reply -> its size in bytes
--   fleet:coordinator:<owner>             string exists while the coordinator's heartbeat is valid; also the name of
--                                                its channel
--   fleet:resigned:<owner>                string exists for a day after the coordinator has shut down
--   fleet:repairs                         hash   kind of damage -> how often an operation found and removed it
--
-- Keys may be missing, evicted, restored from an older copy or of another type. Therefore no loop relies on two keys
-- being consistent: each loop iterates over values that it has read, or at most once per entry of a key. An entry whose
-- counterpart is missing is removed and counted in fleet:repairs.
--
-- A coordinator's heartbeat is its lease on all requests that it owns. `epoch` is the fencing token: it grows with each
-- change of the owner, and writes with another epoch are refused. Callers repeat an operation if its reply is lost, and
-- a network may deliver an operation after its caller's timeout: every operation is idempotent, and harmless when it
-- arrives late.
--
-- `cost` is the relative amount of work that a request causes at a service.

local P = 'fleet:'  -- prefix of all keys
local TERMINAL = 3  -- the lowest RequestState of a request that has ended
local CHURN_MS = 600000  -- window within which losses of workers are related
local FIRST_PAUSE_MS, LONGEST_PAUSE_MS = 200, 5000  -- bounds of the pause in which a coordinator avoids a worker
local AVOIDED_MS = 60000  -- maximum retention of a pause after its end
local RESIGNED_MS = 86400000
local REFUSED_MS, MOST_REFUSED = 600000, 16  -- retention, and maximum number, of refusals of a model
local RECHECK_MS = 50  -- minimum interval of dispatches that repeated claims cause
local MOST_DROPPED = 1000  -- invalid queue entries that one operation removes; later operations remove the rest
local MOST_NOTES = 256  -- entries of a request's timeline
local MOST_EXTRA = 524288  -- bytes of `extra` at which a record stops accepting warnings
local server = redis
local time = server.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local ops = {}
local takes = {}  -- operation -> names of its arguments; a name that ends in * is a list, which may be empty

-- Counts damage that was found and removed. The counter's key may itself be of another type.
local function repaired(kind, count)
  local reply = server.pcall('HINCRBY', P .. 'repairs', kind, count or 1)
  if type(reply) == 'table' and reply.err and string.find(reply.err, 'WRONGTYPE', 1, true) then
    server.call('DEL', P .. 'repairs')
    server.call('HINCRBY', P .. 'repairs', kind, count or 1)
  end
end

-- Replaces redis.call() in all operations. A key of the wrong type contains no data of the fleet: it is deleted and the
-- command is repeated. Exception: the record of a request is not deleted; the error names its key.
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

-- Raises the error for arguments that do not match the operation's declaration, which is a defect of the caller.
local function wrong_call(operation, argument, what)
  local text = 'FLEETCALL ' .. operation .. ': ' .. argument .. ' ' .. what
  error({ err = text .. '; it takes ' .. table.concat(takes[operation], ', ') })
end

-- Returns the arguments of an operation by name. A list repeats its name for each element; a list of pairs alternates
-- between the first and the second elements of the pairs.
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

-- Returns nil if a writer with this epoch may write to the request, else the reason: 'ended' or 'lost'.
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

-- Adds serialized events, with the epoch of the owner that adds them or without an epoch. Returns their ids.
local function add_events(id, events, epoch)
  local ids = {}
  for i, event in ipairs(events) do
    ids[i] = redis.call('XADD', P .. 'events:' .. id, '*', 'event', event, 'epoch', epoch or '')
  end
  return ids
end

-- Adds an entry to the timeline of a request, if the request exists. Once the timeline is half full, a checkpoint entry
-- replaces the latest entry if the latest entry is a checkpoint entry too, so that checkpoint entries do not displace
-- other entries. Returns whether the request is open.
local function note(id, kind, service, worker, number)
  local key, state = P .. 'timeline:' .. id, server.pcall('HGET', P .. 'request:' .. id, 'state')
  if type(state) ~= 'string' then
    return false
  end
  local line = table.concat({ int(now), kind, service, worker, number or 0 }, '|')
  if tonumber(state) and tonumber(state) >= TERMINAL then
    redis.call('RPUSHX', key, line)  -- the timeline expires with the record
    return false
  end
  if kind == 'checkpoint' and redis.call('LLEN', key) > MOST_NOTES / 2
    and string.match(redis.call('LINDEX', key, -1) or '', '^%d+|checkpoint|') then
    redis.call('LSET', key, -1, line)
  else
    redis.call('RPUSH', key, line)
    redis.call('LTRIM', key, -MOST_NOTES, -1)
  end
  return true
end

-- Returns the request id and the service of a claim, from its ticket and its place.
local function parts_of(ticket, place)
  return string.match(ticket, '^[^/]*'), string.match(place, '[^/]*$')
end

local function extend(id, extra)
  if extra ~= '' then
    local key = P .. 'request:' .. id
    redis.call('HSET', key, 'extra', (redis.call('HGET', key, 'extra') or '') .. extra)
  end
end

-- Records the loss of a worker, and removes losses older than CHURN_MS.
local function note_loss(place, worker, at)
  local key = P .. 'lost:' .. place
  redis.call('ZADD', key, int(at), worker)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now - CHURN_MS))
  redis.call('PEXPIRE', key, int(CHURN_MS))
end

-- Returns the number of a new request or queue entry. It is greater than the numbers of all requests, even if the
-- counter was lost or restored from an older copy.
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

-- Returns the variant of a ticket's request; '' for a model with one variant and for a request that has expired.
local function variant_of(ticket)
  local variant = server.pcall('HGET', P .. 'request:' .. string.match(ticket, '^[^/]*'), 'variant')
  return type(variant) == 'string' and variant or ''
end

-- Returns the ms per unit of cost at a service, over the latest requests of a variant, else of all variants; nil before
-- the first measurement.
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

-- Returns the field of fleet:work for a caller and a variant.
local function work_field(caller, variant)
  return variant ~= '' and caller .. '|' .. variant or caller
end
