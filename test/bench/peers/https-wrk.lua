-- For wrk: compares each answer with what it has to be, and prints a line of JSON at the end.
local want = "@BODY@"
local threads = {}
wrong = 0

function setup(thread) table.insert(threads, thread) end

function response(status, headers, body)
	if status ~= 200 or body ~= want then wrong = wrong + 1 end
end

function done(summary, latency, requests)
	local sum = 0
	for _, t in ipairs(threads) do sum = sum + t:get("wrong") end
	local e = summary.errors
	print(string.format('{"requests":%d,"us":%d,"wrong":%d,"errors":%d,"p50":%d,"p99":%d,"p999":%d}',
		summary.requests, summary.duration, sum, e.connect + e.read + e.write + e.status + e.timeout,
		latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
