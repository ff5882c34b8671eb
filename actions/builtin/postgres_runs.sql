-- Whether the session (pid, backend_start) still runs the statement that began at query_start: t or f. Read-only.
-- psql variables: pid, backend_start, query_start. Called by actions/builtin/postgres.py.
SET statement_timeout = '5s';
SET default_transaction_read_only = on;
SELECT EXISTS (SELECT FROM pg_stat_activity
               WHERE pid = :'pid'::int AND backend_start = :'backend_start'::timestamptz
                 AND query_start = :'query_start'::timestamptz AND state = 'active');
