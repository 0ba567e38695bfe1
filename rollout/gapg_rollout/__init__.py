"""Where text comes from: engines on the device, the cloud oracle, its cache, and the records that cross the border."""
