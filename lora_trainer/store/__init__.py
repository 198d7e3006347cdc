"""Storage in S3 or a local folder, and what runs keep there: leases, checkpoints, bundles and `latest.json`."""
