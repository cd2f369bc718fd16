"""Traffic replay: traces of requests, sent to a server when they are due, and reports of what came back."""
