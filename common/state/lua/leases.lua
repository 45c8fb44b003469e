-- Returns fields of a request in fleet:open. If the request is not open, removes its entry and returns no fields.
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

-- Makes a coordinator the owner of requests that no coordinator runs: its own requests that it does not run, and
-- requests of coordinators without a heartbeat. Returns for each: id, epoch, submission, cancel, current time, record
-- and cause (own: its own request, left: the former owner shut down, lost: the former owner's heartbeat expired); then
-- the ids of running requests that the coordinator must cancel. A coordinator without a valid heartbeat gets no
-- requests.
takes.take_over = {
  'owner', 'model',
  'most',        -- maximum number of requests to take over
  'beyond_own',  -- 1 to include requests of coordinators without a heartbeat, else 0
  'running*',    -- ids that this coordinator runs
}
function ops.take_over(a)
  local owner, taken, cancels, runs = a.owner, {}, {}, {}
  if redis.call('EXISTS', P .. 'coordinator:' .. owner) == 0 then
    return { taken, cancels }
  end
  for _, id in ipairs(a.running) do
    runs[id] = true
  end
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'open:' .. a.model)) do
    local key = P .. 'request:' .. id
    local fields = open_fields(a.model, id, 'owner', 'cancel', 'submission')
    local is_own = fields[1] == owner
    if is_own and runs[id] then
      if fields[2] then
        cancels[#cancels + 1] = id
      end
    elseif #taken < tonumber(a.most)
      and (is_own or a.beyond_own == '1' and fields[1]
        and redis.call('EXISTS', P .. 'coordinator:' .. fields[1]) == 0) then
      redis.call('HSET', key, 'owner', owner)
      redis.call('HDEL', key, 'told')
      local epoch = redis.call('HINCRBY', key, 'epoch', 1)
      note(id, 'taken_over', '', owner, epoch)
      local has_left = redis.call('EXISTS', P .. 'resigned:' .. fields[1]) == 1
      local cause = is_own and 'own' or has_left and 'left' or 'lost'
      taken[#taken + 1] = { id, epoch, fields[3] or '', fields[2] or '0', int(now), snapshot(id), cause }
    end
  end
  return { taken, cancels }
end

-- Returns the calls of a request that were lost with their worker, in chronological order. A loss is `open` until the
-- worker's heartbeat expires, then `suspect`; it is `cleared` if the worker sends a heartbeat or shuts down before
-- the expiry. `stage` is the index of the service in the pipeline, `reached` the step of the step checkpoint that was
-- stored when the call was lost.
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
    lines[i] = table.concat({ loss.worker, loss.service, loss.stage, loss.reached, int(loss.at), int(loss.due),
      loss.state, loss.churn and '1' or '0' }, '|')
  end
  redis.call('HSET', P .. 'request:' .. id, 'deaths', table.concat(lines, '\n'))
end

-- Returns whether another worker of the service was lost within CHURN_MS of the loss. `ran` is the set of workers that
-- were lost while they ran the request; these workers do not count.
local function is_in_churn(place, loss, ran)
  local lost = redis.call('ZRANGEBYSCORE', P .. 'lost:' .. place, int(loss.at - CHURN_MS), int(loss.at + CHURN_MS))
  for _, worker in ipairs(lost) do
    if not ran[worker] then
      return true
    end
  end
  return false
end

-- Updates the states of a request's losses. Returns for each loss that is not cleared: worker, service, stage, reached,
-- 1 if it is suspect, 1 if it is in churn, and the ms until it is decided.
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
      -- A worker that runs an older script does not clear losses with its heartbeat. Its key still exists only if
      -- it has sent a heartbeat since the loss.
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

-- Clears the undecided losses of a worker that has sent a heartbeat or shuts down.
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

-- Records that a call whose stages had started was lost with its worker. Returns the same as ops.losses.
takes.death = {
  'id', 'epoch', 'worker',
  'service', 'stage',  -- name of the service, and its index in the pipeline
  'lasts',             -- heartbeat TTL of the worker in ms, if the store does not have it
}
function ops.death(a)
  local id, worker = a.id, a.worker
  if refusal(id, a.epoch) then
    return {}
  end
  local key = P .. 'request:' .. id
  local losses = {}
  for _, loss in ipairs(read_losses(id)) do
    if loss.worker == worker and loss.state ~= 'cleared' then
      return judge(id)  -- the loss was already reported
    elseif loss.worker ~= worker then
      losses[#losses + 1] = loss
    end
  end
  if redis.call('EXISTS', P .. 'leaving:' .. worker) == 0 then
    local lasts = tonumber(redis.call('HGET', P .. 'worker:' .. worker, 'lasts')
      or math.max(tonumber(a.lasts), redis.call('PTTL', P .. 'worker:' .. worker) + 2))
    losses[#losses + 1] = { worker = worker, service = a.service, stage = a.stage,
      reached = redis.call('HGET', key, 'reached') or '0', at = now, due = now + lasts, state = 'open', churn = false }
    write_losses(id, losses)
    note(id, 'lost', a.service, worker)
    note_loss(redis.call('HGET', key, 'model') .. '/' .. a.service, worker, now)
    redis.call('SADD', P .. 'accused:' .. worker, id)
    redis.call('PEXPIRE', P .. 'accused:' .. worker, int(lasts))
  end
  return judge(id)
end

-- Returns the suspect and undecided losses of a request; none if the epoch is not current.
takes.losses = { 'id', 'epoch' }
function ops.losses(a)
  if refusal(a.id, a.epoch) then
    return {}
  end
  return judge(a.id)
end

-- Replaces the step checkpoint of a request: sets the field `point` to the new key and deletes the old key. Deletes the
-- new key instead if a later step checkpoint of the same epoch is stored, the request has ended, or the epoch is not
-- current.
takes.step_checkpoint = {
  'id', 'epoch',
  'checkpoint_key',
  'step',  -- number of completed denoising steps
}
function ops.step_checkpoint(a)
  local key, checkpoint_key = P .. 'request:' .. a.id, a.checkpoint_key
  local before = redis.call('HGET', key, 'point')
  local since, latest = string.match(before or '', ':(%d+)%-(%d+)$')
  local is_late = since == a.epoch and tonumber(latest) > tonumber(string.match(checkpoint_key, '%-(%d+)$'))
  if is_late or refusal(a.id, a.epoch) then
    redis.call('DEL', checkpoint_key)
    return 0
  end
  if before and before ~= checkpoint_key then
    redis.call('DEL', before)
  end
  redis.call('HSET', key, 'point', checkpoint_key, 'reached', a.step)
  note(a.id, 'checkpoint', '', '', a.step)
  return 1
end

-- Stores the heartbeat of a coordinator, valid for `lasts` ms.
takes.beat = { 'owner', 'lasts' }
function ops.beat(a)
  redis.call('SET', P .. 'coordinator:' .. a.owner, '1', 'PX', a.lasts)
end

-- Records that a coordinator shuts down.
takes.resign = { 'owner' }
function ops.resign(a)
  redis.call('SET', P .. 'resigned:' .. a.owner, '1', 'PX', RESIGNED_MS)
  redis.call('DEL', P .. 'coordinator:' .. a.owner, P .. 'avoided:' .. a.owner)
end
