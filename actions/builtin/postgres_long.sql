-- Statements that have run for too long. Read-only. What only maintains (VACUUM and the like) is left out: cancelling it
-- makes the next one longer.
-- psql variables: active_seconds. Called by actions/builtin/postgres.py.
SET statement_timeout = '5s';
SET default_transaction_read_only = on;
SELECT coalesce(json_agg(json_build_object(
           'pid', s.pid,
           'backend_start', to_char(s.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
           'query_start', to_char(s.query_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
           'user', s.usename, 'application', s.application_name, 'state', s.state,
           'seconds', round(extract(epoch FROM now() - s.query_start)),
           'waiters', 0, 'waited', 0
       ) ORDER BY s.query_start, s.pid), '[]')
FROM pg_stat_activity s
JOIN pg_roles o ON o.oid = s.usesysid
WHERE s.backend_type = 'client backend'
  AND s.pid <> pg_backend_pid()
  AND NOT o.rolsuper AND NOT o.rolreplication
  AND s.application_name !~* '^(alertmedic|pg_dump|pg_dumpall|pg_basebackup|pg_receivewal|pgbackrest|barman|wal-g)'
  AND s.state = 'active'
  AND s.query !~* '^\s*(vacuum|analyze|reindex|create\s+(unique\s+)?index|cluster|copy)'
  AND now() - s.query_start >= make_interval(secs => :'active_seconds');
