package handover

// A state says how one of two processes stands to a flow that goes from the old one to the new one. It
// changes by the rules below alone.
//
//	old  kept ──flow──► offered ──taken, sends begin──► given
//	      ▲                │
//	      └──refused, lost, or late or killed, sends keep
//
//	new  none ──flow, sends taken──► registered ──begin, or lost──► begun
//	                                     │
//	                                     └──keep──► dropped
//
// Lost is that the other process has ended, and that all it had sent was read. Who can't send has lost the
// other one, too.
type state uint8

const (
	kept    state = iota // the old process moves its bytes
	offered              // its record was sent
	given                // the new process has it

	none       // the new process does not know it, or has refused it
	registered // it knows it, and moves nothing
	begun      // it moves its bytes
	dropped    // the old process goes on with it
	states
)

var stateNames = [states]string{"kept", "offered", "given", "none", "registered", "begun", "dropped"}

func (s state) String() string { return stateNames[s] }

// An event is what may change the state.
type event uint8

const (
	hasLeft   event = iota // the old process has stopped to move bytes
	saysTaken              // of the new process
	saysRefused
	isKilled // it is taken, and somebody has ended it meanwhile, who knows of the old process alone
	isLate   // no answer has come
	saysFlow
	saysBegin
	saysKeep
	isLost
)

// An action is what a process does at an event, before it is in the next state.
type action uint8

const (
	nothing action = iota
	sendFlow
	sendTaken
	sendBegin
	sendKeepAndMove
	move // it moves the flow's bytes from now on
	forget
)

// rules are who does what when: without one, an event changes nothing.
type rules []struct {
	in   state
	at   event
	next state
	do   action
}

// oldRules are those of the process that has the flow.
var oldRules = rules{
	{kept, hasLeft, offered, sendFlow},
	{offered, saysTaken, given, sendBegin},
	{offered, saysRefused, kept, move},
	{offered, isKilled, kept, sendKeepAndMove},
	{offered, isLate, kept, sendKeepAndMove},
	{offered, isLost, kept, move},
}

// newRules are those of the process that takes it.
var newRules = rules{
	{none, saysFlow, registered, sendTaken},
	{registered, saysBegin, begun, move},
	{registered, isLost, begun, move},
	{registered, saysKeep, dropped, forget},
}

// at is the state after an event, and what is to be done.
func (r rules) at(s state, e event) (next state, do action) {
	for _, rule := range r {
		if rule.in == s && rule.at == e {
			return rule.next, rule.do
		}
	}
	return s, nothing
}
