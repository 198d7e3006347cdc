"""The four personas, and the prompt and reply formats that training, evaluation and serving share."""
