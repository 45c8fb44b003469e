-- A server at its maxmemory checks only the first write of a script, and always accepts DEL. With DEL as the first
-- write, heartbeats, worker slots and ends of accepted requests are still written. New requests and shared replies are
-- refused.
if ARGV[1] ~= 'admit' and ARGV[1] ~= 'keep_reply' then
  server.pcall('DEL', P .. 'none')
end

-- Errors are one line, without the line number in this script. Some servers convert the error table to a string. An
-- error of the server starts with its code in capital letters.
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
  failure = 'FLEETSTORE ' .. ARGV[1] .. ' cannot process the stored data: ' .. failure
end
return { err = failure }
