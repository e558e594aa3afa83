package loader

func (l *Loader) selfTest() []Finding { return nil }
func failed([]Finding) error          { return nil }
