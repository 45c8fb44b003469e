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

-- A coordinator becomes the owner of its own requests that it does not run, and of those of dead coordinators. Returns for
-- each id, epoch, submission, cancel, now and the record; then the ids of those that it runs and should cancel. Only a
-- coordinator that lives takes anything.
takes.take_over = {
  'owner', 'model',
  'most',        -- requests that are taken by one call
  'beyond_own',  -- 1 to take those of dead coordinators too, else 0
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
      and (is_own or a.beyond_own == '1' and fields[1] and redis.call('EXISTS', P .. 'coordinator:' .. fields[1]) == 0) then
      redis.call('HSET', key, 'owner', owner)
      redis.call('HDEL', key, 'told')
      local epoch = redis.call('HINCRBY', key, 'epoch', 1)
      note(id, 'taken_over', '', owner, epoch)
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

-- A call of a request that had begun was lost with its worker. Returns the same as losses.
takes.death = {
  'id', 'epoch', 'worker',
  'service', 'stage',  -- its name, and its place among the services of the request
  'lasts',             -- ms of a heartbeat of that worker, where the store does not know it
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
      return judge(id)  -- reported twice
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

-- The losses that count, or may count; none where the request is not that owner's any more.
takes.losses = { 'id', 'epoch' }
function ops.losses(a)
  if refusal(a.id, a.epoch) then
    return {}
  end
  return judge(a.id)
end

-- Replaces the step checkpoint of a request by a newer one, but not by an earlier one of its epoch. The field 'point'
-- of the request holds its key.
takes.step_checkpoint = {
  'id', 'epoch',
  'checkpoint_key',
  'step',  -- of the loop
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

-- The heartbeat of a coordinator, in effect for `lasts` ms.
takes.beat = { 'owner', 'lasts' }
function ops.beat(a)
  redis.call('SET', P .. 'coordinator:' .. a.owner, '1', 'PX', a.lasts)
end

-- A coordinator ends.
takes.resign = { 'owner' }
function ops.resign(a)
  redis.call('DEL', P .. 'coordinator:' .. a.owner, P .. 'avoided:' .. a.owner)
end
