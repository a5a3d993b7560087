"""A run: the policy, what it is trained on, the loop, the record it keeps."""
