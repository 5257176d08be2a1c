-- What the tags of many guests look like, from tables that mtetool makes. The queries are for DuckDB
-- and Spark, the view is for DuckDB (Spark: spark.read.parquet('fleet').createTempView('runs'));
-- run them in the directory where `fleet/` is, which holds the snapshots of some days:
--
--     mtetool convert *.mtesnap --to parquet -o fleet/
--     duckdb < fleet.sql

CREATE VIEW runs AS
SELECT * FROM read_parquet('fleet/*/*/*.parquet', hive_partitioning = true);

-- The worst-tagged guests on their last day: how much of their memory has no tag.
SELECT guest,
       sum(size_bytes) FILTER (WHERE tag = 0) / sum(size_bytes) AS untagged,
       sum(size_bytes) FILTER (WHERE tag IS NULL) AS unknown_bytes
FROM runs
WHERE (guest, day) IN (SELECT guest, max(day) FROM runs GROUP BY guest)
GROUP BY guest
ORDER BY untagged DESC, guest
LIMIT 10;

-- Tags that never change: runs that every snapshot of a guest has, at the same place.
SELECT guest, ipa, size_bytes, tag
FROM runs JOIN (
    SELECT guest, count(DISTINCT snapshot) AS snapshots FROM runs GROUP BY guest
) USING (guest)
WHERE tag > 0
GROUP BY guest, slot, ipa, size_bytes, tag, snapshots
HAVING count(DISTINCT snapshot) = snapshots
ORDER BY size_bytes DESC, guest, ipa
LIMIT 10;

-- Growth: how much more memory has a tag than on the day before.
SELECT guest, day, tagged, tagged - lag(tagged) OVER (PARTITION BY guest ORDER BY day) AS growth
FROM (
    SELECT guest, day, sum(size_bytes) FILTER (WHERE tag > 0) AS tagged
    FROM runs GROUP BY guest, day
)
ORDER BY guest, day;
