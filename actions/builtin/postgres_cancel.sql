-- Cancels one statement if it is still the planned one: identity, protection and signal are one statement. Prints t or f
-- (the signal was sent or not), or nothing when the statement is not to be cancelled.
-- psql variables: pid, backend_start, query_start, active_seconds. Called by actions/builtin/postgres.py.
SET statement_timeout = '5s';
SELECT pg_cancel_backend(s.pid)
FROM pg_stat_activity s
JOIN pg_roles o ON o.oid = s.usesysid
WHERE s.pid = :'pid'::int
  AND s.backend_start = :'backend_start'::timestamptz
  AND s.query_start = :'query_start'::timestamptz
  AND s.backend_type = 'client backend'
  AND s.pid <> pg_backend_pid()
  AND NOT o.rolsuper AND NOT o.rolreplication
  AND s.application_name !~* '^(alertmedic|pg_dump|pg_dumpall|pg_basebackup|pg_receivewal|pgbackrest|barman|wal-g)'
  AND s.state = 'active'
  AND now() - s.query_start >= make_interval(secs => :'active_seconds');
