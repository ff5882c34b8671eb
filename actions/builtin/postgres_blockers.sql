-- Sessions at the head of a wait chain: others wait for them, they wait for nobody. Read-only.
-- psql variables: idle_seconds, active_seconds. Called by actions/builtin/postgres.py.
SET statement_timeout = '5s';
SET default_transaction_read_only = on;
WITH RECURSIVE waits AS (
    SELECT a.pid AS waiter, b.pid AS holder, now() - coalesce(a.query_start, a.xact_start) AS waited
    FROM pg_stat_activity a CROSS JOIN LATERAL unnest(pg_blocking_pids(a.pid)) AS b (pid)
    WHERE a.wait_event_type = 'Lock'
), chain AS (
    SELECT waiter, holder, waited FROM waits
    UNION
    SELECT w.waiter, c.holder, w.waited FROM waits w JOIN chain c ON w.holder = c.waiter
), roots AS (
    SELECT c.holder AS pid, count(DISTINCT c.waiter) AS waiters, max(c.waited) AS waited
    FROM chain c
    WHERE NOT EXISTS (SELECT FROM waits w WHERE w.waiter = c.holder)
    GROUP BY c.holder
)
SELECT coalesce(json_agg(json_build_object(
           'pid', s.pid,
           'backend_start', to_char(s.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
           'user', s.usename, 'application', s.application_name, 'state', s.state,
           'seconds', round(extract(epoch FROM now() - CASE WHEN s.state = 'active' THEN s.query_start
                                                            ELSE s.state_change END)),
           'waiters', r.waiters, 'waited', round(extract(epoch FROM r.waited))
       ) ORDER BY r.waiters DESC, s.backend_start, s.pid), '[]')
FROM roots r
JOIN pg_stat_activity s ON s.pid = r.pid
JOIN pg_roles o ON o.oid = s.usesysid
WHERE s.backend_type = 'client backend'
  AND s.pid <> pg_backend_pid()
  AND NOT o.rolsuper AND NOT o.rolreplication
  AND s.application_name !~* '^(alertmedic|pg_dump|pg_dumpall|pg_basebackup|pg_receivewal|pgbackrest|barman|wal-g)'
  AND ((s.state LIKE 'idle in transaction%' AND now() - s.state_change >= make_interval(secs => :'idle_seconds'))
    OR (s.state = 'active' AND now() - s.query_start >= make_interval(secs => :'active_seconds')));
