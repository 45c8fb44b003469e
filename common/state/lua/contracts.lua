-- Which workers can take which claims. A worker announces its contract: the slots that it reads and writes, with their
-- types. A claim has a wiring: the slots that its coordinator supplies to the service and reads from it. Both are JSON;
-- common/wiring.py has their form, and the same rule. A worker or a claim of a release without them fits as before.

local WIRINGS_MS = 86400000

-- The digest of a claim's wiring, which its ticket says; nil for a claim without one.
local function wiring_of(ticket)
  return string.match(ticket, '/wiring:(%x+)')
end

-- Stores a wiring under its digest, for the operations that hand slots to others' claims.
local function keep_wiring(place, digest, text)
  if digest and text ~= '' and redis.call('HSETNX', P .. 'wirings:' .. place, digest, text) == 1 then
    redis.call('PEXPIRE', P .. 'wirings:' .. place, WIRINGS_MS)
  end
end

-- The contract on which the processes of the last release agree, while one lives: they compare its text, and fill in a
-- field of the model's record with each heartbeat.
local function older_contract(place)
  local model, service = string.match(place, '^(.*)/([^/]*)$')
  return redis.call('HGET', P .. 'model:' .. model, 'contract:' .. service) or redis.call('GET', P .. 'older:' .. place)
end

-- Moves the contracts that processes of the last release have stated out of their way: one of another release may state
-- others. What was moved expires once nobody states it any more.
local function move_older(model, lasts)
  local key = P .. 'model:' .. model
  local fields = redis.call('HGETALL', key)
  for i = 1, #fields, 2 do
    local service = string.match(fields[i], '^contract:(.*)$')
    if service then
      redis.call('SET', P .. 'older:' .. model .. '/' .. service, fields[i + 1], 'PX', int(3 * tonumber(lasts)))
      redis.call('HDEL', key, fields[i])
    end
  end
end

local function sorted_keys(slots)
  local keys = {}
  for key in pairs(slots) do
    keys[#keys + 1] = key
  end
  table.sort(keys)
  return keys
end

-- The part of a contract that is for a variant, and, where there is none, the names of the variants.
local function part_of(contract, variant)
  local names = {}
  for i, part in ipairs(contract.variants or {}) do
    if part.name == variant or (variant == '' and i == 1) then
      return part
    end
    names[i] = part.name == '' and 'one variant without a name' or part.name
  end
  if #names == 0 then
    return contract
  end
  return nil, table.concat(names, ', ')
end

-- Why a worker with a contract cannot take claims with a wiring, in one sentence; nil where it can.
local function compare(contract, wiring)
  local part, names = part_of(contract, wiring.variant)
  if not part then
    return "variant '" .. wiring.variant .. "': the worker serves only " .. names
  end
  local optional = {}
  for _, slot in ipairs(part.optional) do
    optional[slot] = true
  end
  for _, slot in ipairs(sorted_keys(part.inputs)) do
    local kind, supplied = part.inputs[slot], wiring.supplied[slot]
    if not supplied and not optional[slot] then
      return "input '" .. slot .. "': the worker requires " .. kind .. ', the coordinator supplies none'
    elseif supplied and supplied ~= kind then
      return "input '" .. slot .. "': the worker reads " .. kind .. ', the coordinator supplies ' .. supplied
    end
  end
  for _, slot in ipairs(sorted_keys(wiring.supplied)) do
    if string.match(wiring.supplied[slot], '^Stream%[[%w_]+%]$') and not part.inputs[slot] then
      return "input '" .. slot .. "': the coordinator supplies " .. wiring.supplied[slot] .. ', the worker reads none'
    end
  end
  for _, slot in ipairs(sorted_keys(wiring.read)) do
    local kind, written = wiring.read[slot], part.outputs[slot]
    if written ~= kind then
      return "output '" .. slot .. "': the coordinator reads " .. kind .. ', the worker writes ' .. (written or 'none')
    end
  end
end

-- The same for texts. A text that was lost or damaged excludes nobody: the coordinator compares again.
local function fault_of(contract, wiring)
  if not contract or not wiring or contract == '' then
    return nil
  end
  local succeeded, fault = pcall(function()
    return compare(cjson.decode(contract), cjson.decode(wiring))
  end)
  return succeeded and fault and (string.gsub(fault, '%c', ' ')) or nil
end

-- The digest of the contract of each of these workers, by id, and the contracts by digest. Few workers' own keys are read.
local function contracts_of(place, workers)
  local key, digests, texts, held = P .. 'contracts:' .. place, {}, {}, {}
  local fields = redis.call('HGETALL', key)
  for i = 1, #fields, 2 do
    held[fields[i]] = fields[i + 1]
  end
  for _, worker in ipairs(workers) do
    local digest = held[worker.id]
    if not digest or not texts[digest] then
      local text = redis.call('HGET', P .. 'worker:' .. worker.id, 'contract') or older_contract(place) or ''
      digest = server.sha1hex(text)
      texts[digest] = text
      if held[worker.id] ~= digest then
        redis.call('HSET', key, worker.id, digest)
      end
    end
    digests[worker.id], held[worker.id] = digest, nil
  end
  for id in pairs(held) do
    redis.call('HDEL', key, id)
  end
  redis.call('PEXPIRE', key, int(CHURN_MS))
  return digests, texts
end

-- Why these workers cannot take claims with a wiring, by id; those that can have no entry. Equal contracts are compared
-- once.
local function faults_of(place, workers, wiring)
  local digests, texts = contracts_of(place, workers)
  local found, by_digest = {}, {}
  for digest, text in pairs(texts) do
    by_digest[digest] = fault_of(text, wiring)
  end
  for _, worker in ipairs(workers) do
    found[worker.id] = by_digest[digests[worker.id]]
  end
  return found
end

-- The workers that fit a claim's wiring, by its digest: their capacity and number, and the set of those that do not fit,
-- with the `fault` of one of them. For as long as the index is valid, which it must be, this is computed once.
local function fit_of(place, digest)
  local key, field = P .. 'indexed:' .. place, 'fit:' .. digest
  local text = redis.call('HGET', key, field)
  if not text then
    local workers, capacity, live, lines, first = live_workers(place), 0, 0, { '' }, ''
    local faults = faults_of(place, workers, redis.call('HGET', P .. 'wirings:' .. place, digest))
    for _, worker in ipairs(workers) do
      local fault = faults[worker.id]
      if fault then
        lines[#lines + 1] = worker.id
        first = first ~= '' and first or 'worker ' .. worker.id .. ', ' .. fault
      else
        capacity, live = capacity + worker.capacity, live + 1
      end
    end
    lines[1] = int(capacity) .. '|' .. int(live) .. '|' .. first
    text = table.concat(lines, '\n')
    redis.call('HSET', key, field, text)
    redis.call('PEXPIRE', P .. 'wirings:' .. place, WIRINGS_MS)
  end
  local capacity, live, fault, rest = string.match(text, '^(%d+)|(%d+)|([^\n]*)(.*)$')
  local fit = { capacity = tonumber(capacity), live = tonumber(live), unfit = {}, fault = fault }
  for id in string.gmatch(rest or '', '[^\n]+') do
    fit.unfit[id] = true
  end
  return fit
end
