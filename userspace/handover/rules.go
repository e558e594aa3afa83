package handover

// A state says how one of two processes stands to a flow that goes from the old one to the new one, or to the
// upgrade as a whole. It changes by the rules below alone. Of a flow:
//
//	old  kept ──flow──► offered ──taken, sends begin──► given
//	      ▲                │
//	      └──refused, lost, or late or killed, sends keep
//
//	new  none ──flow, sends taken──► registered ──begin, or lost──► begun
//	                                     │
//	                                     └──keep──► dropped
//
// Of the upgrade:
//
//	old  serves ──ready, sends yours──► rests ──serving──► proves ──it lasts, names it──► names
//	        ▲                             │                   │                             │
//	        ├──────lost, or late, kills───┴───────lost────────┴──lost, names itself─────────┤
//	                                                                                        │
//	     fails ◄──lost, ends with an error── hasHanded ◄──the manager has heard, sends main─┘
//
//	new  starts ──yours, sends serving──► accepts ──main, or lost──► isMain
//	        │
//	        └──lost──► gaveUp
//
// Lost is that the other process has ended, and that all it had sent was read. Who can't send has lost the
// other one, too. The steps of the old process in an upgrade are its owner's, who is to act by these rules.
type state uint8

const (
	kept    state = iota // the old process moves its bytes
	offered              // its record was sent
	given                // the new process has it

	none       // the new process does not know it, or has refused it
	registered // it knows it, and moves nothing
	begun      // it moves its bytes
	dropped    // the old process goes on with it

	serves    // the old process accepts connections, and is the service manager's main one
	rests     // it accepts none
	proves    // the new one accepts, and may still fail: all that the old one had stays as it is
	names     // the manager is told that the new process is the main one
	hasHanded // the new process is the main one
	fails     // nobody accepts: another daemon is to be started

	starts  // the new process accepts nothing
	accepts // it accepts connections
	isMain  // it is the main one, too
	gaveUp  // it ends
	states
)

var stateNames = [states]string{"kept", "offered", "given", "none", "registered", "begun", "dropped",
	"serves", "rests", "proves", "names", "hasHanded", "fails", "starts", "accepts", "isMain", "gaveUp"}

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

	saysReady
	saysYours
	saysServing
	saysMain
	lasts   // the new process has served for a while
	isHeard // the manager has heard what it was told, or does not answer
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

	sendYours
	sendServing
	nameNew
	sendMain
	acceptAgain
	nameOldAndAccept
	endWithError
	killAndAccept
	beMain
	giveUp
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

// oldProcess and newProcess are those of the upgrade as a whole.
var (
	oldProcess = rules{
		{serves, saysReady, rests, sendYours},
		{rests, saysServing, proves, nothing},
		{rests, isLate, serves, killAndAccept},
		{rests, isLost, serves, acceptAgain},
		{proves, lasts, names, nameNew},
		{proves, isLost, serves, acceptAgain},
		{names, isHeard, hasHanded, sendMain},
		{names, isLost, serves, nameOldAndAccept},
		{hasHanded, isLost, fails, endWithError},
	}
	newProcess = rules{
		{starts, saysYours, accepts, sendServing},
		{starts, isLost, gaveUp, giveUp},
		{accepts, saysMain, isMain, beMain},
		{accepts, isLost, isMain, beMain},
	}
)

// at is the state after an event, and what is to be done.
func (r rules) at(s state, e event) (next state, do action) {
	for _, rule := range r {
		if rule.in == s && rule.at == e {
			return rule.next, rule.do
		}
	}
	return s, nothing
}
