"""What the services tell about themselves: spans, metrics and log lines; never prompts or text."""
