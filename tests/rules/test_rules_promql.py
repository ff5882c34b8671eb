"""The shipped queries, evaluated by Prometheus' own engine (promtool) over metrics as services expose them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rules.packs import PackSet

# service s speaks OpenTelemetry's names, u the older ones; t never had an error. One sample a second, rates per second.
OTEL = "http_server_request_duration_seconds"
OLD = "http_request_duration_seconds"
CLIENT = "http_client_request_duration_seconds"
DATABASE = "db_client_operation_duration_seconds"
POOL = "db_client_connection"
SERIES: dict[str, str] = {
    'up{service="s",instance="1"}': "1x40",
    'up{service="s",instance="2"}': "0x40",
    'scrape_duration_seconds{service="s"}': "0.5x40",
    'process_cpu_seconds_total{service="s"}': "0+0.5x40",
    'process_resident_memory_bytes{service="s"}': "300x40",
    'process_virtual_memory_bytes{service="s"}': "320x40",
    'process_memory_limit_bytes{service="s"}': "400x40",
    'process_resident_memory_bytes{service="t"}': "300x40",
    'process_virtual_memory_bytes{service="t"}': "500x40",
    'process_memory_limit_bytes{service="t"}': " ".join(["inf"] * 41),
    'process_virtual_memory_bytes{service="u"}': "500x40",
    'process_virtual_memory_max_bytes{service="u"}': "1000x40",
    'process_open_fds{service="s"}': "10x40",
    'process_max_fds{service="s"}': "100x40",
    'process_start_time_seconds{service="s"}': "1000x25 2000x15",
    f'{OTEL}_count{{service="s",http_route="/a",http_response_status_code="200"}}': "0+8x40",
    f'{OTEL}_count{{service="s",http_route="/a",http_response_status_code="500"}}': "0+2x40",
    f'{OTEL}_count{{service="t",http_route="/a",http_response_status_code="200"}}': "0+4x40",
    f'{OTEL}_sum{{service="s"}}': "0+2x40",
    f'{OTEL}_bucket{{service="s",le="0.1"}}': "0+5x40",
    f'{OTEL}_bucket{{service="s",le="0.5"}}': "0+10x40",
    f'{OTEL}_bucket{{service="s",le="+Inf"}}': "0+10x40",
    'http_server_active_requests{service="s"}': "3x40",
    'http_requests_total{service="u",code="200"}': "0+3x40",
    'http_requests_total{service="u",code="503"}': "0+1x40",
    f'{OLD}_bucket{{service="u",le="1"}}': "0+4x40",
    f'{OLD}_bucket{{service="u",le="+Inf"}}': "0+4x40",
    f'{OLD}_sum{{service="u"}}': "0+1x40",
    f'{OLD}_count{{service="u"}}': "0+4x40",
    f'{CLIENT}_count{{service="s",server_address="d",error_type=""}}': "0+3x40",
    f'{CLIENT}_count{{service="s",server_address="d",error_type="timeout"}}': "0+1x40",
    f'{CLIENT}_count{{service="s",server_address="e",error_type=""}}': "0+1x40",
    f'{CLIENT}_bucket{{service="s",server_address="d",le="1"}}': "0+4x40",
    f'{CLIENT}_bucket{{service="s",server_address="d",le="+Inf"}}': "0+4x40",
    f'{CLIENT}_count{{service="s",server_address="c",error_type=""}}': "0+5x40",
    f'{CLIENT}_count{{service="s",server_address="c",error_type="ClientConnectorDNSError"}}': "0+1x40",
    f'{CLIENT}_count{{service="s",server_address="c",error_type="ClientConnectorCertificateError"}}': "0+2x40",
    f'{CLIENT}_count{{service="s",server_address="c",error_type="ServerDisconnectedError"}}': "0+2x40",
    'http_client_active_requests{service="s",server_address="d"}': "5x40",
    'probe_ssl_earliest_cert_expiry{service="s"}': "1000x40",
    'process_thread_count{service="s"}': "7x40",
    f'{POOL}_count{{service="s",db_client_connection_pool_name="a",db_client_connection_state="used"}}': "3x40",
    f'{POOL}_count{{service="s",db_client_connection_pool_name="a",db_client_connection_state="idle"}}': "1x40",
    f'{POOL}_max{{service="s",db_client_connection_pool_name="a"}}': "4x40",
    f'{POOL}_pending_requests{{service="s",db_client_connection_pool_name="a"}}': "2x40",
    'hikaricp_connections_active{service="u",pool="a"}': "5x40",
    'hikaricp_connections_max{service="u",pool="a"}': "10x40",
    'hikaricp_connections_pending{service="u",pool="a"}': "1x40",
    'cache_gets_total{service="s",cache="a",result="hit"}': "0+3x40",
    'cache_gets_total{service="s",cache="a",result="miss"}': "0+1x40",
    'cache_gets_total{service="s",cache="b",result="hit"}': "0+9x40",
    'cache_gets_total{service="t",cache="a",result="hit"}': "0+1x40",
    'cache_hits_total{service="u"}': "0+4x40",
    'cache_misses_total{service="u"}': "0+1x40",
    'log_messages_total{service="s",level="info"}': "0+2x40",
    'log_messages_total{service="s",level="debug"}': "0+5x40",
    'logback_events_total{service="u",level="warn"}': "0+3x40",
    'log4j2_events_total{service="v",level="info"}': "0+8x40",
    'process_clock_seconds{service="s"}': "100+1x40",
    'node_time_seconds{service="t"}': "0+1x40",
    'node_timex_offset_seconds{service="u"}': "-0.25x40",
    'build_info{service="s",version="1"}': "1x20 stale _x20",
    'build_info{service="s",version="2"}': "_x20 1x20",
    'prometheus_build_info{service="u",version="3"}': "1x40",
    'feature_flag_enabled{service="s",flag="f"}': "1x40",
    'worker_jobs_total{service="s",status="done"}': "0+3x40",
    'worker_jobs_total{service="s",status="failed"}': "0+1x40",
    'worker_jobs_total{service="s",status="expired"}': "0+7x40",
    'worker_busy{service="s"}': "2x40",
    'container_cpu_usage_seconds_total{service="s",container="main"}': "0+0.25x40",
    'container_cpu_usage_seconds_total{service="s",container=""}': "0+0.3x40",
    'container_spec_cpu_quota{service="s",container="main"}': "50000x40",
    'container_spec_cpu_period{service="s",container="main"}': "100000x40",
    'container_memory_working_set_bytes{service="s",container="main"}': "256x40",
    'container_memory_working_set_bytes{service="s",container=""}': "300x40",
    'worker_pool_size{service="s"}': "4x40",
    'queue_depth{service="s",queue="q"}': "7x40",
    'queue_oldest_age_seconds{service="s",queue="q"}': "3x40",
    'pg_up{service="s"}': "1x40",
    'pg_stat_activity_max_tx_duration{service="s",datname="a",state="idle in transaction"}': "9x40",
    'pg_stat_activity_max_tx_duration{service="s",datname="a",state="active"}': "2x40",
    'pg_stat_activity_count{service="s",datname="a",state="active"}': "5x40",
    'pg_stat_activity_count{service="s",datname="a",state="idle"}': "15x40",
    'pg_settings_max_connections{service="s"}': "100x40",
    'pg_locks_count{service="s",datname="a",mode="accessexclusivelock"}': "1x40",
    'pg_locks_count{service="s",datname="a",mode="exclusivelock"}': "30x40",
    f'{DATABASE}_count{{service="s",server_address="p",error_type=""}}': "0+9x40",
    f'{DATABASE}_count{{service="s",server_address="p",error_type="timeout"}}': "0+1x40",
    f'{DATABASE}_bucket{{service="s",server_address="p",le="0.1"}}': "0+10x40",
    f'{DATABASE}_bucket{{service="s",server_address="p",le="+Inf"}}': "0+10x40",
    'node_cpu_seconds_total{service="s",cpu="0",mode="idle"}': "0+0.9x40",
    'node_cpu_seconds_total{service="s",cpu="0",mode="user"}': "0+0.1x40",
    'node_cpu_seconds_total{service="s",cpu="1",mode="idle"}': "0+0.1x40",
    'node_schedstat_waiting_seconds_total{service="s",cpu="0"}': "0+0.5x40",
    'node_pressure_io_waiting_seconds_total{service="s"}': "0+0.4x40",
    'node_memory_MemAvailable_bytes{service="s"}': "25x40",
    'node_memory_MemTotal_bytes{service="s"}': "100x40",
    'node_vmstat_pswpin{service="s"}': "0+6x40",
    'node_filesystem_avail_bytes{service="s",mountpoint="/",fstype="ext4",device="a"}': "10x40",
    'node_filesystem_size_bytes{service="s",mountpoint="/",fstype="ext4",device="a"}': "100x40",
    'node_filesystem_avail_bytes{service="s",mountpoint="/run",fstype="tmpfs",device="b"}': "0x40",
    'node_filesystem_size_bytes{service="s",mountpoint="/run",fstype="tmpfs",device="b"}': "100x40",
}
S = '{service="s"}'
C, D, E = (f'{{service="s", server_address="{callee}"}}' for callee in "cde")
P = '{service="s", server_address="p"}'
EXPECTED: dict[str, dict[str, float]] = {
    "up": {S: 0},
    "scrape_seconds": {S: 0.5},
    "process_cpu_cores": {S: 0.5},
    "process_memory_bytes": {S: 300, '{service="t"}': 300},
    "process_memory_used_ratio": {S: 0.75, '{service="t"}': 0},
    "process_address_space_used_ratio": {S: 0.8, '{service="t"}': 0, '{service="u"}': 0.5},
    "process_fds_used_ratio": {S: 0.1},
    "process_restarts": {S: 1},
    "http_request_rate": {S: 10, '{service="t"}': 4, '{service="u"}': 4},
    "http_error_ratio": {S: 0.2, '{service="t"}': 0, '{service="u"}': 0.25},
    "http_latency_p95": {S: 0.46, '{service="u"}': 0.95},
    "http_latency_mean": {S: 0.2, '{service="u"}': 0.25},
    "http_active_requests": {S: 3},
    "http_client_latency_p95": {D: 0.95},
    "http_client_error_ratio": {C: 0.5, D: 0.25, E: 0},
    "call_name_error_ratio": {C: 0.1, D: 0, E: 0},
    "call_certificate_error_ratio": {C: 0.2, D: 0, E: 0},
    "call_connection_error_ratio": {C: 0.2, D: 0, E: 0},
    "call_rate": {C: 10, D: 4, E: 1},
    "certificate_seconds_left": {S: 970},
    "program_threads": {S: 7},
    "db_pool_used_ratio": {S: 0.75, '{service="u"}': 0.5},
    "db_pool_waiting": {S: 2, '{service="u"}': 1},
    "cache_miss_ratio": {S: 0.25, '{service="t"}': 0, '{service="u"}': 0.2},
    "log_lines_per_request": {S: 0.7, '{service="u"}': 0.75},
    "log_lines_rate": {'{service="v"}': 8},
    "clock_offset_seconds": {S: 100, '{service="t"}': 0, '{service="u"}': 0.25},
    "builds_seen": {S: 2, '{service="u"}': 1},
    "http_client_active_requests": {D: 5},
    "feature_flag_enabled": {'{service="s", flag="f"}': 1},
    "cpu_usage_percent": {S: 50},
    "memory_usage_bytes": {S: 256},
    "worker_jobs_rate": {S: 3},
    "worker_failed_jobs_rate": {S: 1},
    "worker_busy_ratio": {S: 0.5},
    "queue_depth": {'{service="s", queue="q"}': 7},
    "queue_oldest_age_seconds": {'{service="s", queue="q"}': 3},
    "pg_up": {S: 1},
    "pg_idle_in_transaction_seconds": {S: 9},
    "pg_active_transaction_seconds": {S: 2},
    "pg_active_sessions": {S: 5},
    "pg_blocking_locks": {S: 1},
    "pg_connections_used_ratio": {S: 0.2},
    "db_client_latency_p95": {P: 0.095},
    "db_client_error_ratio": {P: 0.1},
    "db_client_operation_rate": {P: 10},
    "host_cpu_busy_ratio": {S: 0.5},
    "host_cpu_busiest_core_ratio": {S: 0.9},
    "host_cpu_waiting_ratio": {S: 0.5},
    "host_memory_available_ratio": {S: 0.25},
    "host_swap_in_pages": {S: 6},
    "host_disk_used_ratio": {'{service="s", mountpoint="/"}': 0.9},
    "host_io_waiting_ratio": {S: 0.4},
}


def test_every_query_gives_what_its_signal_means(packs: PackSet, program: Callable[..., str], tmp_path: Path) -> None:
    queries = {
        q.name: q.query.replace("$scope", 'service=~"s|t|u|v"').replace("$service", "service").replace("$rate", "10s")
        for q in packs.queries()
        if q.source == "prometheus" and "$alert(" not in q.query  # those: tests/anyalert, on a real server
    }
    assert set(EXPECTED) == set(queries)
    checks = [
        {
            "expr": f"round({queries[name]}, 0.001)",
            "eval_time": "30s",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in expected.items()],
        }
        for name, expected in EXPECTED.items()
    ]
    series = [{"series": name, "values": values} for name, values in SERIES.items()]
    document = {
        "evaluation_interval": "1s",
        "tests": [{"interval": "1s", "input_series": series, "promql_expr_test": checks}],
    }
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump(document, width=10_000))
    done = subprocess.run(
        [program("promtool", "prometheus"), "test", "rules", str(path)], capture_output=True, text=True, timeout=60
    )
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr)
