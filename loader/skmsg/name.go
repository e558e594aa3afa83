package skmsg

// Name is what configuration, logs and metrics call this datapath.
const Name = "sk_msg"
