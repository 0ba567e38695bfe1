"""The device model: loading, adapters, attention, the policy's log-probs, what it needs in memory."""
