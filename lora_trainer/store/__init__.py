"""Object storage over S3 or a local folder, and what runs keep there: leases, checkpoints, bundles, pointers."""
