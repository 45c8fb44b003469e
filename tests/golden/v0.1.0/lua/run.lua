-- A full server refuses a script's first write that takes memory, and none after another write: heartbeats, slots and
-- ends of accepted requests go on, new requests and shared replies do not.
if ARGV[1] ~= 'admit' and ARGV[1] ~= 'keep_reply' then
  server.pcall('DEL', P .. 'none')
end

-- A failure is a reply of one line, without the place in this file that a traceback has. Some servers turn the table
-- of an error into its text. An error of the server begins with its code in capital letters.
local succeeded, reply = pcall(function()
  if not ops[ARGV[1]] then
    error({ err = 'FLEETCALL ' .. ARGV[1] .. ' is not an operation' })
  end
  return ops[ARGV[1]](named(ARGV[1]))
end)
if succeeded then
  return reply
end
local failure = string.gsub(type(reply) == 'table' and reply.err or tostring(reply), '^@?user_script: ?%d+: %-?', '')
if not string.find(failure, '^%u+ ') or string.find(failure, '^ERR ') then
  failure = 'FLEETSTORE ' .. ARGV[1] .. ' cannot use what the store holds: ' .. failure
end
return { err = failure }
