"""Storage in S3 or a local folder, and its contents: leases, checkpoints, bundles and `latest.json`."""
