"""What the README's numbers come from: speeds beside what this machine's own limits allow."""
