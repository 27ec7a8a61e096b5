"""What tests share: models, rows, trainers, processes, servers. No test imports another."""
