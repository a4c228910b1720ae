"""Workers: processes that own one device each, and the engines that run models on it."""
