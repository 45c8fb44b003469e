-- Outstanding work of a service in compute seconds: remaining steps times the pace of their shape. A pace is the moving
-- average of the compute seconds of a step, as workers report them. For a service without steps, a request is one step.

local MOST_SHAPES = 64
local PACES_MS = 604800000  -- TTL of paces that no request updates

-- Returns the work of a request at a service: steps, tokens of one step, shape, completed fraction; nil if none is
-- stored.
local function work_of(id, service)
  local fields = server.pcall('HMGET', P .. 'request:' .. id, 'work:' .. service, 'done:' .. service)
  if fields.err then
    return nil
  end
  local steps, tokens, shape = string.match(fields[1] or '', '^(%d+)|(%d+)|(.*)$')
  return steps and { steps = tonumber(steps), tokens = tonumber(tokens), shape = shape,
    done = tonumber(fields[2]) or 0 }
end

local function read_pace(text)
  local seconds, steps, tokens, at = string.match(text or '', '^(%S+) (%S+) (%d+) (%d+)$')
  if at and (tonumber(steps) or 0) > 0 and tonumber(seconds) then
    return { seconds = tonumber(seconds), steps = tonumber(steps), tokens = tonumber(tokens), at = tonumber(at) }
  end
end

-- Adds an attempt to the pace of its shape. Only the latest MOST_SHAPES shapes are retained.
local function note_pace(place, work, seconds, steps)
  local key = P .. 'paces:' .. place
  local before = read_pace(redis.call('HGET', key, work.shape)) or { seconds = 0, steps = 0 }
  redis.call('HSET', key, work.shape, string.format('%.6f %.6f %s %s', seconds + 0.8 * before.seconds,
    steps + 0.8 * before.steps, int(work.tokens), int(now)))
  redis.call('PEXPIRE', key, PACES_MS)
  if redis.call('HLEN', key) <= MOST_SHAPES then
    return
  end
  local entries, ages = redis.call('HGETALL', key), {}
  for i = 1, #entries, 2 do
    local pace = read_pace(entries[i + 1])
    ages[#ages + 1] = { shape = entries[i], at = pace and pace.at or 0 }
  end
  table.sort(ages, function(a, b)
    return a.at < b.at or (a.at == b.at and a.shape < b.shape)
  end)
  for i = 1, #ages - MOST_SHAPES do
    redis.call('HDEL', key, ages[i].shape)
  end
end

-- Adds the compute seconds of an attempt to the pace. The attempt computed the steps `skipped` + 1 to
-- `reached`; `reached` is nil if the attempt computed all remaining steps.
local function note_computed(ticket, place, seconds, skipped, reached)
  local work = work_of(string.match(ticket, '^[^/]*'), string.match(place, '[^/]*$'))
  local last = work and math.min(reached or work.steps, work.steps)
  if work and seconds and skipped and last > skipped then
    note_pace(place, work, seconds, last - skipped)
  end
end

-- Returns a function that estimates the seconds of one step of a request's work. The estimate is the pace of the work's
-- shape, else the pace of the shape with the closest number of tokens, scaled by tokens; nil if nothing is measured.
local function paces_of(place)
  local entries, known, nearest = redis.call('HGETALL', P .. 'paces:' .. place), {}, {}
  for i = 1, #entries, 2 do
    known[entries[i]] = read_pace(entries[i + 1])
  end
  return function(work)
    local exact = known[work.shape]
    if exact then
      return exact.seconds / exact.steps
    end
    if not nearest[work.tokens] then
      local best, distance
      for _, pace in pairs(known) do
        local apart = math.abs(math.log(math.max(work.tokens, 1) / math.max(pace.tokens, 1)))
        if not best or apart < distance or (apart == distance and pace.at > best.at) then
          best, distance = pace, apart
        end
      end
      nearest[work.tokens] = best and best.seconds / best.steps * work.tokens / math.max(best.tokens, 1)
    end
    return nearest[work.tokens]
  end
end

-- Returns whether an open request still needs a service.
local function is_needed(id, service)
  return server.pcall('HEXISTS', P .. 'request:' .. id, 'left:' .. service) == 1
end

-- Returns 1 if an open request still needs the service, else 0; then the time in ms at which a request last stopped
-- needing it, 0 if no request did so within CHURN_MS.
takes.stage_activity = { 'place' }  -- model/service
function ops.stage_activity(a)
  local model, service = string.match(a.place, '^(.*)/([^/]*)$')
  local ended = tonumber(redis.call('GET', P .. 'needed:' .. a.place)) or 0
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'open:' .. model)) do
    if is_needed(id, service) then
      return { 1, int(ended) }
    end
  end
  return { 0, int(ended) }
end

-- Returns the load of a service: busy workers, seconds of running work, waiting claims, seconds of waiting work, open
-- requests that still need the service, and 1 if the seconds contain assumed durations, else 0. Claims of lost
-- coordinators do not count: the coordinator that takes the request over makes a new claim.
takes.stage_load = {
  'place',    -- model/service
  'assumed',  -- assumed seconds of a request, if nothing is measured
}
function ops.stage_load(a)
  local model, service = string.match(a.place, '^(.*)/([^/]*)$')
  local pace, unmeasured, alive = paces_of(a.place), 0, {}
  local function seconds_of(ticket)
    local work = work_of(string.match(ticket, '^[^/]*'), service)
    local step = work and pace(work)
    if not step then
      unmeasured = 1
    end
    local whole = step and work.steps * step or tonumber(a.assumed)
    return whole * math.max(1 - (work and work.done or 0), 0)
  end
  local busy, held = busy_slots(a.place, live_workers(a.place))
  local workers, running, claims, waiting, open = 0, 0, 0, 0, 0
  for _ in pairs(busy) do
    workers = workers + 1
  end
  for _, slot in ipairs(held) do
    running = running + seconds_of(slot.ticket)
  end
  local entries = redis.call('HGETALL', P .. 'waiting:' .. a.place)
  for i = 1, #entries, 2 do
    local owner = string.match(entries[i + 1], '|([^|]*)$') or ''
    if alive[owner] == nil then
      alive[owner] = redis.call('EXISTS', P .. 'coordinator:' .. owner) == 1
    end
    if alive[owner] then
      claims, waiting = claims + 1, waiting + seconds_of(entries[i])
    end
  end
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'open:' .. model)) do
    open = open + (is_needed(id, service) and 1 or 0)
  end
  return { workers, string.format('%.6f', running), claims, string.format('%.6f', waiting), open, unmeasured }
end
