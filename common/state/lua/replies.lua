-- Renews the TTL of a reply to `lasts` ms.
takes.touch_reply = { 'name', 'lasts' }
function ops.touch_reply(a)
  local name, lasts = a.name, a.lasts
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

-- Returns the sizes of the shared replies in bytes, by name. Removes sizes without a reply and replies without a size.
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

-- Stores a reply under its name, and evicts the least recently used replies beyond `most` bytes.
takes.keep_reply = {
  'parts',  -- key of the reply's frames
  'name',
  'bytes',  -- size of the reply
  'most',   -- maximum size of all replies in bytes
  'lasts',  -- TTL of the reply in ms
}
function ops.keep_reply(a)
  local parts, name, lasts, most = a.parts, a.name, a.lasts, tonumber(a.most)
  for _, expired in ipairs(redis.call('ZRANGEBYSCORE', P .. 'replies', '-inf', int(now))) do
    drop_reply(expired)
  end
  drop_reply(name)
  if redis.call('EXISTS', parts) == 0 then
    return
  end
  local sizes, total = reply_sizes(), tonumber(a.bytes)
  for _, size in pairs(sizes) do
    total = total + size
  end
  for _, oldest in ipairs(redis.call('ZRANGE', P .. 'replies', 0, -1)) do
    if total <= most then
      break
    end
    total = total - (sizes[oldest] or 0)
    drop_reply(oldest)
  end
  if total > most then
    redis.call('DEL', parts)
    return
  end
  redis.call('RENAME', parts, P .. 'reply:' .. name)
  redis.call('ZADD', P .. 'replies', int(now + tonumber(lasts)), name)
  redis.call('HSET', P .. 'reply-sizes', name, a.bytes)
  for _, key in ipairs({ 'reply:' .. name, 'replies', 'reply-sizes' }) do
    redis.call('PEXPIRE', P .. key, lasts)
  end
end
