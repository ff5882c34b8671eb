CREATE TABLE products (
    id integer PRIMARY KEY,
    name text NOT NULL,
    cents integer NOT NULL
);
INSERT INTO products SELECT n, 'article ' || n, 500 + 37 * n FROM generate_series(1, 40) AS n;

CREATE TABLE orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    product integer NOT NULL REFERENCES products,
    cents integer NOT NULL,
    signature text NOT NULL,
    state text NOT NULL DEFAULT 'placed'
);

-- A queue: workers claim rows with SKIP LOCKED; a claim is a lease, so that a dead worker's job comes back.
CREATE TABLE jobs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id bigint NOT NULL,
    state text NOT NULL DEFAULT 'queued',
    queued_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    claimed_at timestamptz
);
CREATE INDEX jobs_waiting ON jobs (id) WHERE state = 'queued';
CREATE INDEX jobs_running ON jobs (claimed_at) WHERE state = 'running';
