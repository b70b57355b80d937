"""Who shards the student and moves it: DeepSpeed ZeRO-3, or plain torch in one process."""
