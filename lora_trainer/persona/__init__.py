"""Who the four friends are, and the prompt and reply forms that everything shares."""
