-- Deadlocks counted since the statistics were reset, who waits for whom, and the settings that matter. Read-only. Texts
-- of statements are not shown: they hold people's data.
-- Called by actions/builtin/postgres.py.
SET statement_timeout = '5s';
SET default_transaction_read_only = on;
SELECT json_build_object(
    'databases', (SELECT json_agg(json_build_object('database', d.datname, 'deadlocks', d.deadlocks,
                                                    'since', d.stats_reset) ORDER BY d.datname)
                  FROM pg_stat_database d WHERE d.datname IS NOT NULL),
    'waits', (SELECT coalesce(json_agg(w), '[]') FROM (
        SELECT a.pid AS waiting, a.usename AS "user", pg_blocking_pids(a.pid) AS blocked_by,
               l.locktype, l.mode, l.relation::regclass::text AS relation,
               round(extract(epoch FROM now() - coalesce(l.waitstart, a.query_start))) AS seconds
        FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid AND NOT l.granted
        ORDER BY seconds DESC NULLS LAST LIMIT 50) w),
    'deadlock_timeout', current_setting('deadlock_timeout'),
    'log_lock_waits', current_setting('log_lock_waits'));
