-- Sessions that sit in an open transaction and do nothing. Read-only.
-- psql variables: idle_seconds. Called by actions/builtin/postgres.py.
SET statement_timeout = '5s';
SET default_transaction_read_only = on;
SELECT coalesce(json_agg(json_build_object(
           'pid', s.pid,
           'backend_start', to_char(s.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
           'user', s.usename, 'application', s.application_name, 'state', s.state,
           'seconds', round(extract(epoch FROM now() - s.state_change)),
           'waiters', 0, 'waited', 0
       ) ORDER BY s.state_change, s.pid), '[]')
FROM pg_stat_activity s
JOIN pg_roles o ON o.oid = s.usesysid
WHERE s.backend_type = 'client backend'
  AND s.pid <> pg_backend_pid()
  AND NOT o.rolsuper AND NOT o.rolreplication
  AND s.application_name !~* '^(alertmedic|pg_dump|pg_dumpall|pg_basebackup|pg_receivewal|pgbackrest|barman|wal-g)'
  AND s.state LIKE 'idle in transaction%'
  AND now() - s.state_change >= make_interval(secs => :'idle_seconds');
