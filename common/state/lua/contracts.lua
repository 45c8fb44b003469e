-- Compatibility of workers and claims. A worker announces a contract: the slots that it reads and writes, with their
-- types. A claim has a wiring: the slots that its coordinator supplies to the service and reads from it. Both are JSON;
-- common/wiring.py defines the format and implements the same rule. A worker that stores no contract has the contract
-- of older_contract(); without that contract, it is compatible with every claim. A claim without a wiring comes from an
-- earlier release and is compatible with every worker, except hidden workers (see live_workers() in slot_index.lua).

local WIRINGS_MS = 86400000

-- Returns the digest of a claim's wiring, which is a part of its ticket; nil for a claim without a wiring.
local function wiring_of(ticket)
  return string.match(ticket, '/wiring:(%x+)')
end

-- Stores a wiring by its digest, for operations that grant worker slots to claims of other coordinators.
local function store_wiring(place, digest, text)
  if digest and text ~= '' and redis.call('HSETNX', P .. 'wirings:' .. place, digest, text) == 1 then
    redis.call('PEXPIRE', P .. 'wirings:' .. place, WIRINGS_MS)
  end
end

-- Returns the contract of processes of the previous release, while such a process is live. These processes write their
-- contract to a field of the model's record with each heartbeat, and require equal texts.
local function older_contract(place)
  local model, service = string.match(place, '^(.*)/([^/]*)$')
  return redis.call('HGET', P .. 'model:' .. model, 'contract:' .. service) or redis.call('GET', P .. 'older:' .. place)
end

-- Moves contracts of the previous release from the model's record to fleet:older, so that a process of the previous
-- release with another contract is not refused. A moved contract expires once no process writes it.
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

-- Returns the part of a contract for a variant, or nil and the names of the contract's variants.
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

-- Returns one sentence that states why a worker with this contract cannot run claims with this wiring; nil if it can.
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

-- compare() for JSON texts. A missing or damaged text excludes no worker, because the coordinator compares again.
local function fault_of(contract, wiring)
  if not contract or not wiring or contract == '' then
    return nil
  end
  local succeeded, fault = pcall(function()
    return compare(cjson.decode(contract), cjson.decode(wiring))
  end)
  return succeeded and fault and (string.gsub(fault, '%c', ' ')) or nil
end

-- Returns the contract digests of these workers by id, and the contracts by digest. Digests are cached in
-- fleet:contracts, so that few keys of workers are read.
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

-- Returns the faults of the workers that cannot run claims with this wiring, by worker id. Equal contracts are compared
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

-- Compares the live workers with the wiring of this digest. Returns a table: `capacity` and `live` are the total
-- capacity and the number of the workers that fit; `unfit` is the set of the ids of all other workers, and `fault` the
-- fault of one of these other workers. Requires a valid index; the result is cached while the index is valid.
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
