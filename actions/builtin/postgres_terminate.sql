-- Ends one session if it is still the planned one and still does harm: identity, protection, harm and signal are one
-- statement. Prints t or f (the signal was sent or not), or nothing when the session is not to be ended.
-- psql variables: pid, backend_start, mode (blockers | idle). Called by actions/builtin/postgres.py.
SET statement_timeout = '5s';
SELECT pg_terminate_backend(s.pid)
FROM pg_stat_activity s
JOIN pg_roles o ON o.oid = s.usesysid
WHERE s.pid = :'pid'::int
  AND s.backend_start = :'backend_start'::timestamptz
  AND s.backend_type = 'client backend'
  AND s.pid <> pg_backend_pid()
  AND NOT o.rolsuper AND NOT o.rolreplication
  AND s.application_name !~* '^(alertmedic|pg_dump|pg_dumpall|pg_basebackup|pg_receivewal|pgbackrest|barman|wal-g)'
  AND CASE :'mode'
        WHEN 'blockers' THEN EXISTS (SELECT FROM pg_stat_activity w
                                     WHERE w.wait_event_type = 'Lock' AND s.pid = ANY (pg_blocking_pids(w.pid)))
                             AND cardinality(pg_blocking_pids(s.pid)) = 0
        WHEN 'idle' THEN s.state LIKE 'idle in transaction%'
        ELSE false
      END;
