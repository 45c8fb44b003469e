-- Adds events to a request. Refused once the request has ended or the epoch is not current. If the reply is lost, a
-- repetition returns the same reply.
takes.append = {
  'id', 'epoch',
  'number',   -- number of events that this owner has added before these
  'state',    -- new state, or ''
  'extra',    -- addition to the record, serialized
  'events*',  -- serialized
  'done*',    -- pairs of service and completed fraction of its work
}
function ops.append(a)
  local refused = refusal(a.id, a.epoch)
  if refused then
    return { refused }
  end
  local key, ids = P .. 'request:' .. a.id, {}
  local latest, appended = string.match(redis.call('HGET', key, 'told') or '', '^(%d+) ?(.*)$')
  if latest and tonumber(a.number) <= tonumber(latest) then
    for each in string.gmatch(a.number == latest and appended or '', '%S+') do
      ids[#ids + 1] = each
    end
    return { 'appended', ids }
  end
  if a.state ~= '' then
    redis.call('HSET', key, 'state', a.state, 'updated', int(now))
  end
  if redis.call('HSTRLEN', key, 'extra') < MOST_EXTRA then
    extend(a.id, a.extra)
  end
  for i = 1, #a.done, 2 do
    redis.call('HSET', key, 'done:' .. a.done[i], a.done[i + 1])
  end
  ids = add_events(a.id, a.events, a.epoch)
  redis.call('HSET', key, 'told', a.number .. ' ' .. table.concat(ids, ' '))
  return { 'appended', ids }
end

-- Records that a request no longer needs a service: subtracts its cost from the open work there, at most once.
local function settle(id, service)
  local key = P .. 'request:' .. id
  local fields = redis.call('HMGET', key, 'left:' .. service, 'model', 'caller', 'variant')
  if tonumber(fields[1]) and fields[2] and fields[3] then
    local work, field = P .. 'work:' .. fields[2] .. '/' .. service, work_field(fields[3], fields[4] or '')
    redis.call('HDEL', key, 'left:' .. service)
    redis.call('SET', P .. 'needed:' .. fields[2] .. '/' .. service, int(now), 'PX', CHURN_MS)
    if redis.call('HINCRBY', work, field, -tonumber(fields[1])) <= 0 then
      redis.call('HDEL', work, field)
    end
  end
end

-- Ends a request, whose record expires in `keep` ms.
local function finish(id, token, state, extra, keep)
  local key = P .. 'request:' .. id
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local service = string.match(field, '^left:(.*)$')
    if service then
      settle(id, service)
    elseif string.match(field, '^work:') or string.match(field, '^done:') or string.match(field, '^ticket:') then
      redis.call('HDEL', key, field)
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
  redis.call('PEXPIRE', P .. 'timeline:' .. id, keep)
  if fields[2] and fields[2] ~= '' then
    redis.call('PEXPIRE', P .. 'idempotency:' .. fields[2], keep)
  end
end

-- Ends a request for its owner. A repetition with the same token succeeds; every other later call is refused.
takes.finish = {
  'id', 'epoch', 'state',
  'token',    -- id of this call and its repetitions
  'extra',    -- addition to the record, serialized
  'keep',     -- TTL of the record in ms
  'events*',  -- serialized
}
function ops.finish(a)
  local refused = refusal(a.id, a.epoch)
  if refused then
    local mine = redis.call('HGET', P .. 'request:' .. a.id, 'token') == a.token
    return { mine and 'finished' or refused, {} }
  end
  finish(a.id, a.token, a.state, a.extra, a.keep)
  local events = add_events(a.id, a.events, a.epoch)
  redis.call('PEXPIRE', P .. 'events:' .. a.id, a.keep)
  prune_index()
  return { 'finished', events }
end

-- Asks the owner of a request to cancel it, or ends the request if its owner is lost. Returns 1 if this call, or an
-- earlier attempt of it with the same token, ended the request, else 0; then the record. `state`, `keep` and `events`
-- are used only if this call ends the request.
takes.cancel = {
  'id',
  'state',    -- terminal state
  'token',    -- id of this call and its repetitions
  'keep',     -- TTL of the record in ms
  'events*',  -- serialized
}
function ops.cancel(a)
  local id, key = a.id, P .. 'request:' .. a.id
  if is_open(id) then
    local owner = redis.call('HGET', key, 'owner') or ''
    redis.call('HSET', key, 'cancel', '1')
    if redis.call('EXISTS', P .. 'coordinator:' .. owner) == 1 then
      redis.call('PUBLISH', P .. 'coordinator:' .. owner, 'cancel\n' .. id)
    else
      finish(id, a.token, a.state, '', a.keep)
      add_events(id, a.events)
      redis.call('PEXPIRE', P .. 'events:' .. id, a.keep)
    end
  end
  return { redis.call('HGET', key, 'token') == a.token and 1 or 0, snapshot(id) }
end
